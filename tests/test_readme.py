"""The README's example runs as it stands, and its commands exist."""

import re
from pathlib import Path

import typer.main

from fastdiff import cli

README = Path(__file__).parent.parent / "README.md"


def test_python_example_runs():
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    scope: dict = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["images"].shape == (3, 3, 32, 32) and scope["sevens"].shape == (16, 1, 28, 28)
    assert scope["slow"].std() > 0.3


def test_commands_and_options_exist():
    commands = typer.main.get_command(cli.app).commands
    lines = re.findall(r"^fastdiff (.*)|&& fastdiff (.*)$|`fastdiff ([^`]*)`", README.read_text(), re.MULTILINE)
    used = [next(part for part in groups if part).split() for groups in lines]
    assert len(used) >= 4
    for name, *words in used:
        options = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, (name, words)

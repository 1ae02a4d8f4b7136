"""DESIGN.md's tree, held over the syntax trees: imports go down only, and one floor speaks to the dispatcher."""

import ast
from pathlib import Path

import pytest

import fastdiff

ROOT = Path(fastdiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Floors from the top; a module may import from its own floor's own part and from every floor below.
# unet/checkpoints and plan/samplers are two wings of one floor: neither imports the other.
FLOORS = [
    {"__main__"},
    {"cli", "training_cli"},
    {"commands"},
    {"sample", "training", "metrics", "info", "images", "accelerate"},
    {"held"},
    {"compile"},
    {"request", "invariant"},
    {"model"},
    {"plan", "samplers", "unet", "checkpoints"},
    {"evaluation"},
    {"denoiser", "nn", "stepwise"},
    {"schedules", "unet_config", "flags", "layers"},
    {"ops"},
    {"kernels", "_C", "version", "atomic", "cache", "modules"},
]
# Allowed within a floor: training draws and measures samples, samplers return Plans, checkpoints become UNets.
SIDEWAYS = {
    ("cli", "training_cli"),
    ("training", "sample"),
    ("training", "images"),
    ("training", "metrics"),
    ("metrics", "sample"),
    ("samplers", "plan"),
    ("checkpoints", "unet"),
}
# Written below what it needs by design: the op registry loads back ends; everything may say its version.
FLOOR = {part: i for i, parts in enumerate(FLOORS) for part in parts}


def part(module):
    """fastdiff.samplers.ode -> samplers; the package itself -> "" (its __init__ may import all)."""
    return module.split(".")[1] if "." in module else ""


def module_of(path):
    inner = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fastdiff", *(inner[:-1] if inner[-1] == "__init__" else inner)))


def imported(tree):
    """Every fastdiff module that a file imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastdiff")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module == "fastdiff":
                yield from (f"fastdiff.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("fastdiff."):
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = part(module_of(path))
    if not own:
        return
    assert own in FLOOR, f"{own} is on no floor of DESIGN.md's tree; give it one in this test"
    for module in imported(ast.parse(path.read_text())):
        other = part(module)
        if module.startswith("fastdiff.__") or other == own or (own, other) in SIDEWAYS:
            continue
        if other not in FLOOR:  # a public name of the package: only the top floors may look back at it
            assert FLOOR[own] <= FLOOR["commands"], f"{own} imports the package itself ({module})"
            continue
        assert FLOOR[own] < FLOOR[other], f"{own} imports {module}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_ops_speak_to_the_dispatcher(path):
    """torch.ops.fastdiff, torch.library and fastdiff.kernels: nowhere but in ops."""
    if part(module_of(path)) == "ops":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            assert not chain.startswith(("torch.ops.fastdiff", "torch.library")), f"line {node.lineno}: {chain}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(n.startswith(("fastdiff.kernels", "triton")) for n in names), f"line {node.lineno}"


def test_torch_ops_are_said_in_ops():
    """The test above looks at real code: ops does say it."""
    text = (ROOT / "ops" / "philox_normal.py").read_text()
    assert any(
        ast.unparse(n).startswith("torch.ops.fastdiff") for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)
    )


def test_tree_is_complete():
    """Every part of the package has a floor, and no floor names what does not exist."""
    parts = {part(module_of(p)) for p in FILES} - {""}
    assert parts <= set(FLOOR)
    assert set(FLOOR) - parts <= {"kernels", "_C"}

"""What ahead/<op>.py declares, which kernels the sources launch, and the facts of compile_ahead.py."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
AHEAD = sorted(Path(__file__).with_name("ahead").glob("*.py"))


def declared(name):
    """name of each file of cases -> its constant `name`, read without running the file, which imports Triton."""
    found = {}
    for path in AHEAD:
        assigned = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == name]
        found[path.stem] = ast.literal_eval(assigned[0].value) if assigned else {}
    return found


def kernels():
    """The jit functions of kernels/triton that no other jit function mentions: what is launched."""
    bodies = {}
    for path in (ROOT / "kernels" / "triton").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                bodies[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return {name for name in bodies if not any(name in used for other, used in bodies.items() if other != name)}


def compiled(out, every=True):
    """The facts that compile_ahead.py writes to `out`: every case for every architecture, or as it says."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTDIFF_PDL")}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    program = Path(__file__).with_name("compile_ahead.py")
    options = ["--every"] if every else []
    run = subprocess.run([sys.executable, program, out, *options], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(Path(out).read_text())

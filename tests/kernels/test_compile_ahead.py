"""Every kernel compiled for the architectures its file of cases names, and what its PTX must and must not hold."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    out = tmp_path_factory.mktemp("ahead") / "facts.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    program = Path(__file__).with_name("compile_ahead.py")
    run = subprocess.run([sys.executable, program, out], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text())


def where(fact):
    return f"{fact['op']}: {fact['kernel']}, {fact['case']}, sm_{fact['architecture']}"


def test_every_kernel_is_compiled_for_its_architectures(facts):
    made = {op: {f["architecture"] for f in facts if f["op"] == op and f["case"] != "huge"} for op in declared("NOISE")}
    assert made == {op: set(architectures) for op, architectures in declared("ARCHITECTURES").items()}
    assert kernels() == {f["kernel"] for f in facts}, "a case in ahead/<op>.py for each kernel that is launched"


def test_noise_is_not_contracted_or_approximated(facts):
    """What the interpreter cannot see: one fused multiply-add changes 1 % of the noise's bits."""
    noise = [f for f in facts if f["noise"]]
    assert {f["op"] for f in noise} == {op for op, makes in declared("NOISE").items() if makes}
    for f in noise:
        assert f["options"]["enable_fp_fusion"] is False, where(f)
        assert not re.findall(r"fma\.\S*f32|\.approx|\.ftz", f["ptx"]), where(f)
        assert "mul.hi.u32" not in f["ptx"] or "sqrt.rn.f32" in f["ptx"], where(f)
    assert {f["op"] for f in noise if "mul.hi.u32" in f["ptx"]} == {f["op"] for f in noise}, "Philox is where noise is made"


def test_bfloat16_rounds_to_nearest_even(facts):
    """The interpreter's own conversion truncates, and is replaced in conftest.py; this is the hardware's."""
    narrowing = [f for f in facts if re.search(r"arith\.truncf .* to tensor<\S*bf16>", f["ttir"])]
    assert narrowing
    for f in narrowing:
        assert re.search(r"cvt\.rn\.bf16", f["ptx"]), where(f)


def test_no_spills(facts):
    """Spills go to local memory."""
    allowed = declared("STACK")
    for f in facts:
        assert f["local"] == 0 and f["stack"] <= allowed[f["op"]].get(f["kernel"], (0,))[0], (where(f), f["stack"])


def test_wide_accesses(facts):
    """Tensors move 128 bits at a time; narrower accesses are tables, per-channel parameters and statistics."""
    narrow = declared("NARROW")
    for f in (f for f in facts if f["case"] != "huge"):
        for word, instruction in (("loads", "ld"), ("stores", "st")):
            if f"{f['kernel']} {word}" not in narrow[f["op"]]:
                assert re.search(rf"{instruction}\.global\S*\.v4\.b32", f["ptx"]), (where(f), word)
        if f"{f['kernel']} loads" not in narrow[f["op"]] or f"{f['kernel']} stores" not in narrow[f["op"]]:
            assert not re.search(r"(ld|st)\.global\S*\.b(8|16)\b", f["ptx"]), where(f)


def test_offsets_are_64_bits(facts):
    """Past 2^31 elements: every tensor of pointers is moved by int64 offsets, or by a constant, never by a wrapped int32."""
    huge = [f for f in facts if f["case"] == "huge"]
    assert {f["op"] for f in huge} >= {"add_noise", "group_norm_silu"}
    for f in huge:
        moves = re.findall(r"tt\.addptr %\S+, (%\S+) : tensor<[^,]*>, tensor<\S*x(i32|i64)>", f["ttir"])
        constants = set(re.findall(r"(%\S+) = arith\.constant", f["ttir"]))
        assert moves
        assert all(width == "i64" or offset in constants for offset, width in moves), (where(f), moves)

"""Every kernel compiled for sm_80, sm_90 and sm_100 on this machine, and what its PTX must and must not hold."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOISE = {"_philox_normal", "_add_noise", "_denoise_step"}


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


def test_all_kernels_for_all_architectures(facts):
    made = {(f["kernel"], f["architecture"]) for f in facts}
    assert {(kernel, a) for kernel in NOISE for a in (80, 90, 100)} <= made
    assert {k for k, _ in made} == NOISE | {"_whole", "_partial", "_apply", "_sums", "_fold", "_dx"}


def test_noise_is_not_contracted_or_approximated(facts):
    """What the interpreter cannot see: one fused multiply-add changes 1 % of the noise's bits."""
    for f in facts:
        if f["kernel"] in NOISE:
            assert f["options"]["enable_fp_fusion"] is False
            assert not re.findall(r"fma\.\S*f32|\.approx|\.ftz", f["ptx"]), f["kernel"]
            assert "sqrt.rn.f32" in f["ptx"]


def test_bfloat16_rounds_to_nearest_even(facts):
    """The interpreter's own conversion truncates, and is replaced in conftest.py; this is the hardware's."""
    for f in facts:
        if "bfloat16" in f["case"] and "st.global" in f["ptx"] and f["kernel"] in NOISE | {"_whole", "_apply", "_dx"}:
            assert re.search(r"cvt\.rn\.bf16", f["ptx"]), (f["case"], f["kernel"])


def test_no_spills(facts):
    """Spills go to local memory. Triton's build of denoise_step for sm_90 has 8 bytes of stack; `ptxas -v` says no spill."""
    for f in facts:
        assert f["local"] == 0 and f["stack"] <= 8, (f["case"], f["kernel"], f["architecture"], f["stack"])


def test_wide_accesses(facts):
    """Tensors move 128 bits at a time; narrower accesses are tables, per-channel parameters and statistics."""
    for f in facts:
        if f["case"] == "huge" or f["kernel"] in ("_fold",):
            continue
        loads, stores = ("_partial", "_sums"), ("_philox_normal",)
        if f["kernel"] not in stores:
            assert re.search(r"ld\.global\S*\.v4\.b32", f["ptx"]), (f["case"], f["kernel"])
        if f["kernel"] not in loads:
            assert re.search(r"st\.global\S*\.v4\.b32", f["ptx"]), (f["case"], f["kernel"])
        assert not re.search(r"(ld|st)\.global\S*\.b(8|16)\b", f["ptx"]), (f["case"], f["kernel"])


def test_offsets_are_64_bits(facts):
    """Past 2^31 elements: every tensor of pointers is moved by int64 offsets, or by a constant, never by a wrapped int32."""
    huge = [f for f in facts if f["case"] == "huge"]
    assert {f["kernel"] for f in huge} == {"_add_noise", "_partial", "_apply"}
    for f in huge:
        moves = re.findall(r"tt\.addptr %\S+, (%\S+) : tensor<[^,]*>, tensor<\S*x(i32|i64)>", f["ttir"])
        constants = set(re.findall(r"(%\S+) = arith\.constant", f["ttir"]))
        assert moves
        assert all(width == "i64" or offset in constants for offset, width in moves), (f["kernel"], moves)

"""Every kernel compiled for the architectures its file of cases names: what its PTX and SASS must and must not hold.

Every case for sm_90 and one of each kernel for the other architectures; every case for all of them in the slow tests.
"""

import importlib.util
import re

import ahead_cases
import machine_code
import pytest
from ahead_cases import declared


@pytest.fixture(scope="module", params=["sm_90", pytest.param("every", marks=pytest.mark.slow)])
def facts(request, tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return ahead_cases.compiled(tmp_path_factory.mktemp("ahead") / "facts.json", every=request.param == "every")


def where(fact):
    return f"{fact['op']}: {fact['kernel']}, {fact['case']}, sm_{fact['architecture']}"


def test_every_kernel_is_compiled_for_its_architectures(facts):
    made = {op: {f["architecture"] for f in facts if f["op"] == op and f["case"] != "huge"} for op in declared("NOISE")}
    assert made == {op: set(architectures) for op, architectures in declared("ARCHITECTURES").items()}
    assert ahead_cases.kernels() == {f["kernel"] for f in facts}, "a case in ahead/<op>.py for each kernel that is launched"


def test_dependent_launches_wait_first(facts):
    """And let the next kernel be placed only then, their own tensor memory in hand: see dependent.py."""
    early = re.compile(r"\b(?:ld\.global|st\.global|cp\.async|atom|red|bra|brx|call|ret|exit)\b")
    for f in facts:
        ptx = re.sub(r"//.*", "", f["ptx"])
        words = re.findall(r"griddepcontrol\.\w+", ptx)
        if f["architecture"] < 90:
            assert not f["pdl"] and not words, where(f)
            continue
        assert f["pdl"] and words == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"], where(f)
        assert not early.search(ptx.split(words[0])[0]), where(f)
        assert "tcgen05.alloc" not in ptx.split(words[1])[1], where(f)
        assert not machine_code.unguarded(f["sass"]), where(f)
    assert any("tcgen05.alloc" in f["ptx"] for f in facts)


def test_noise_is_not_contracted_or_approximated(facts):
    """What the interpreter cannot see: one fused multiply-add changes 1 % of the noise's bits."""
    noise = [f for f in facts if f["noise"]]
    assert {f["op"] for f in noise} == {op for op, makes in declared("NOISE").items() if makes}
    for f in noise:
        assert f["options"]["enable_fp_fusion"] is False, where(f)
        assert not re.findall(r"fma\.\S*f32|\.approx|\.ftz", f["ptx"]), where(f)
        assert not machine_code.contractions(f["sass"]), where(f)
        assert not machine_code.makes_noise(f["sass"]) or "sqrt.rn.f32" in f["ptx"], where(f)
    assert {(f["op"], f["noise"]) for f in facts} >= {(f["op"], True) for f in facts if machine_code.makes_noise(f["sass"])}
    assert {f["op"] for f in noise if machine_code.makes_noise(f["sass"])} == {f["op"] for f in noise}


def test_bfloat16_rounds_to_nearest_even(facts):
    """The interpreter's own conversion truncates, and is replaced in conftest.py; this is the hardware's."""
    narrowing = [f for f in facts if re.search(r"arith\.truncf .* to tensor<\S*bf16>", f["ttir"])]
    assert narrowing
    for f in narrowing:
        assert re.search(r"cvt\.rn\.bf16", f["ptx"]), where(f)


def test_no_spills(facts):
    allowed = {kernel: most for of in declared("STACK").values() for kernel, (most, _) in of.items()}
    for f in facts:
        most = allowed.get(f["kernel"], allowed.get(f"{f['kernel']}, {f['case']}", 0))
        assert f["local"] == 0 and f["stack"] <= most, (where(f), f["stack"])
        assert most or not machine_code.spills(f["sass"]), where(f)


def test_wide_accesses(facts):
    """Tensors move 128 bits at a time; narrower accesses are tables, per-channel parameters and statistics."""
    narrow = {words for of in declared("NARROW").values() for words in of}  # a kernel may serve two ops
    for f in (f for f in facts if f["case"] != "huge"):
        names = {word: f"{f['kernel']} {word}" for word in machine_code.ACCESSES}
        words = [word for word, name in names.items() if not {name, f"{name}, {f['case']}"} & narrow]
        for word in words:
            assert machine_code.is_wide(f["sass"], word), (where(f), word)
        if words:
            assert not re.findall(r"\b(?:LDG|STG)\.E\.[US](?:8|16)\b", "\n".join(f["sass"])), where(f)


def test_offsets_are_64_bits(facts):
    """Past 2^31 elements: every tensor of pointers is moved by int64 offsets, or by a constant, never by a wrapped int32."""
    huge = [f for f in facts if f["case"] == "huge"]
    assert {f["op"] for f in huge} >= {"add_noise", "group_norm_silu"}
    for f in huge:
        moves = re.findall(r"tt\.addptr %\S+, (%\S+) : tensor<[^,]*>, tensor<\S*x(i32|i64)>", f["ttir"])
        constants = set(re.findall(r"(%\S+) = arith\.constant", f["ttir"]))
        assert moves
        assert all(width == "i64" or offset in constants for offset, width in moves), (where(f), moves)


def test_eight_bits_go_to_the_tensor_cores(facts):
    """As E4M3, never widened; on sm_90 every 128 products are waited for and added in float32."""
    instruction = {90: r"wgmma\.mma_async\S*f32\.e4m3\.e4m3", 100: r"tcgen05\.mma\S*kind::f8f6f4"}
    products = [f for f in facts if f["op"] == "conv3x3" and f["kernel"] == "_multiply"]
    assert products
    for f in products:
        assert re.search(instruction[f["architecture"]], f["ptx"]) and not re.search(r"cvt\S*f16x2\.e4m3", f["ptx"]), where(
            f
        )
        if f["architecture"] == 90:
            assert re.search(r"wgmma\.mma_async(?s:.)*?wgmma\.wait_group\S* 0(?s:.)*?add\.f32", f["ptx"]), where(f)
    rounded = [f for f in facts if f["op"] == "conv3x3" and f["kernel"] in ("_whole", "_apply") and f["case"] != "huge"]
    assert rounded and all("cvt.rn.satfinite.e4m3x2.f32" in f["ptx"] for f in rounded)

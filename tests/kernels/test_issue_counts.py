"""benchmarks/instructions.py counted again in the code that nvcc makes for sm_90."""

import importlib.util

import cuda_sources
import machine_code
import pytest

WITHIN = 0.15  # compilers differ by a few instructions; more is another kernel, whose roof is another
BENCHMARKS = cuda_sources.ROOT / "benchmarks"


def wide(loads, stores, pairs, clips=0, exponentials=0):
    """What the main path of a thread passes: 128-bit accesses, pairs of normals, clips of D, exponentials."""
    found = {r"LDG\.E\S*\.128": loads, r"STG\.E\S*\.128": stores, r"MUFU\.RSQ": pairs}
    of_d = {r"FSETP\S* .*, -1, ": clips, r"F2I\.NTZ": exponentials}
    return found | of_d if clips else found


def step_cases():
    """(dtype, terms) -> kernel and what it passes. A share is 4 elements beside a float32 network, 8 beside a 16-bit one."""
    found = {}
    for dtype, type_, n in (("float32", "float", 4), ("bfloat16", "__nv_bfloat16", 8)):
        of_x = n // 4  # 128-bit accesses to x; one for each tensor of the network's
        kernel = f"step<1, {n}, float, {type_}>"
        found[dtype, "noise"] = kernel, wide(of_x + 1, of_x + 1, n // 2, n)
        found[dtype, "no noise"] = kernel, wide(of_x + 1, of_x + 1, 0, n)
        found[dtype, "guided"] = kernel, wide(of_x + 2, of_x + 2, 0, n)
        found[dtype, "noise learned"] = kernel, wide(of_x + 2, of_x + 1, n // 2, n, n)
    for dtype, type_, more in (("float32", "float", wide(6, 6, 0, 12)), ("bfloat16", "__nv_bfloat16", wide(3, 3, 0, 12))):
        narrow = {} if dtype == "float32" else {r"STG\.E\S*\.64": 3}  # three channels of four pixels: 24 bytes
        found[dtype, "channels-last"] = f"step<3, 4, float, {type_}>", more | narrow
        found[dtype, "noise channels-last"] = f"step<3, 4, float, {type_}>", more | narrow | {r"MUFU\.RSQ": 6}
    return found


CASES = {
    "philox_normal": {
        "float32": ("fill<4, float>", wide(0, 1, 2)),
        "bfloat16": ("fill<8, __nv_bfloat16>", wide(0, 1, 4)),
    },
    "add_noise": {"float32": ("forms<4, float, float>", wide(1, 2, 2))},
    "denoise_step": step_cases(),
}


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_counts_of_the_benchmarks(op, tmp_path):
    if reason := cuda_sources.why_not():
        pytest.skip(reason)
    spec = importlib.util.spec_from_file_location("instructions", BENCHMARKS / "instructions.py")
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert written.OF_A_SHARE[op].keys() == CASES[op].keys()
    facts = cuda_sources.facts(cuda_sources.ROOT / "csrc" / "cuda" / f"{op}.cu", tmp_path, [90])
    made = {cuda_sources.demangled(fact["function"]): fact["sass"] for fact in facts}
    for case, (kernel, passed) in CASES[op].items():
        counted, (instructions, _) = machine_code.main_path(made[kernel], passed), written.OF_A_SHARE[op][case]
        assert abs(counted - instructions) <= WITHIN * instructions, (case, counted, instructions)


def test_main_path():
    """A loop that must be gone through twice, a branch that need not be taken, a call over which a branch leads."""
    code = ["MOV R1, R2", "@P0 BRA 0x40", "LDG.E.128 R4, [R2]", "BRA 0x60", "CALL.REL.NOINC 0x90", "IADD R3, R3, 0x1",
            "STG.E.128 [R2], R4", "@P1 BRA 0x10", "EXIT", "RET.REL.NODEC R6 0x0"]  # fmt: skip
    sass = [f"{16 * i:04x} {instruction}" for i, instruction in enumerate(code)]
    assert machine_code.main_path(sass, {}) == 7
    assert machine_code.main_path(sass, {r"LDG": 2, r"STG": 2}) == 12
    with pytest.raises(ValueError, match="no way"):
        machine_code.main_path(sass, {"MUFU": 1})

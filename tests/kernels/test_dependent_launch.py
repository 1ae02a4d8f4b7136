"""Programmatic dependent launch: every launch asks for it, every kernel launched waits first. kernels/triton/dependent.py.

test_compile_ahead.py and test_cuda_machine_code.py hold the same of what the compilers make.
"""

import ast
import ctypes
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import ahead_cases
import cuda_sources
import machine_code
import pytest
import torch

from fastdiff.ops import _register, seed_tensor

TREES = {p.stem: ast.parse(p.read_text()) for p in sorted((ahead_cases.ROOT / "kernels" / "triton").glob("*.py"))}
JIT = {
    (stem, node.name): node
    for stem, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
}
SEEN = ("grid", "threads", "shared", "cluster", "dependent", "argument", "asked")  # of launch_host.cpp


def visible(stem):
    """Name -> (module, name) of the jit functions that a module of kernels/triton defines or imports."""
    found = {name: (module, name) for module, name in JIT if module == stem}
    for node in ast.walk(TREES[stem]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastdiff.kernels."):
            module = node.module.removeprefix("fastdiff.kernels.")
            found |= {a.asname or a.name: (module, a.name) for a in node.names if (module, a.name) in JIT}
    return found


def launches(stem):
    """(the call, the kernels it may launch) for each kernel[grid](...) of a module."""
    names = visible(stem)
    for node in ast.walk(TREES[stem]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            used = {n.id for n in ast.walk(node.func.value) if isinstance(n, ast.Name)}
            yield node, {names[name] for name in used & names.keys()}


def unpacked(call):
    """The functions whose results a call takes as keywords."""
    return {ast.unparse(k.value.func) for k in call.keywords if k.arg is None and isinstance(k.value, ast.Call)}


def test_every_launch_passes_the_keywords():
    launched = set()
    for stem in TREES:
        for call, kernels in launches(stem):
            assert kernels, f"{stem}, line {call.lineno}: what is launched?"
            assert "dependent" in unpacked(call), f"{stem}, line {call.lineno}: **dependent(...) is missing"
            launched |= kernels
    assert {name for _, name in launched} == ahead_cases.kernels()


def test_kernels_are_launched_in_no_other_way():
    """Their names are said in launches and in jit functions alone."""
    for stem, tree in TREES.items():
        names = {name: key for name, key in visible(stem).items() if key != ("dependent", "begin")}
        inside = {id(n) for key, f in JIT.items() if key[0] == stem for n in ast.walk(f)}
        inside |= {id(n) for call, _ in launches(stem) for n in ast.walk(call.func.value)}
        said = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names and id(n) not in inside]
        assert not said, f"{stem}, line {said[0].lineno}: {said[0].id}"


def test_what_is_launched_begins_and_nothing_else_does():
    launched = {kernel for stem in TREES for _, kernels in launches(stem) for kernel in kernels}
    assert len(launched) > 20
    for key, function in JIT.items():
        said = [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == "begin"]
        assert len(said) == (key in launched), key
        if key in launched:
            first = function.body[1 if ast.get_docstring(function) else 0]
            assert ast.unparse(first) == "begin(PDL)", key
            last = function.args.args[-1]
            assert (last.arg, ast.unparse(last.annotation)) == ("PDL", "tl.constexpr") and not function.args.defaults, key


def test_cuda_kernels_begin_and_go_through_launch():
    kernels = 0
    for source in sorted(cuda_sources.SOURCES[0].parent.iterdir()):
        text = source.read_text()
        bodies = re.findall(r"__global__[^{;]*\{\s*(.*)", text)
        assert all(first == "begin();" for first in bodies), source.name
        kernels += len(bodies)
        assert "<<<" not in text, f"{source.name}: launch<kernel>(...) of launch.cuh instead"
        assert len(re.findall(r"\bcudaLaunch\w*Kernel\w*\(", text)) == (source.name == "launch.cuh"), source.name
    assert kernels == sum(len(cuda_sources.kernel_names(source)) for source in cuda_sources.SOURCES) > 0


@pytest.fixture
def launch_on_host(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here")
    (tmp_path / "cuda_runtime.h").touch()
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-fno-gnu-unique", f"-I{tmp_path}", f"-I{ahead_cases.ROOT / 'csrc'}"]
    out = tmp_path / "launch.so"
    subprocess.run([compiler, *flags, Path(__file__).with_name("launch_host.cpp"), "-o", out], check=True)
    function = ctypes.CDLL(str(out)).launch_on_host
    function.restype = ctypes.c_char_p

    def launch(device, version, cluster=1, argument=3):
        seen = (ctypes.c_int * 7)()
        error = function(device, version, cluster, argument, seen)
        return error or dict(zip(SEEN, seen, strict=True))

    return launch


def test_cuda_launches_by_the_version_of_the_code(launch_on_host, monkeypatch):
    """Code for sm_80 that a newer GPU compiles from PTX waits nowhere: it may not be launched as if it did."""
    monkeypatch.delenv("FASTDIFF_PDL", raising=False)
    always = {"grid": 7, "threads": 256, "shared": 1024, "argument": 3}
    assert launch_on_host(0, 90) == always | {"cluster": 0, "dependent": 1, "asked": 1}
    assert launch_on_host(0, 0, cluster=8) == always | {"cluster": 8, "dependent": 1, "asked": 1}  # known: not asked again
    assert launch_on_host(1, 80, cluster=4) == always | {"cluster": 4, "dependent": 0, "asked": 2}
    assert launch_on_host(1, 0) == always | {"cluster": 0, "dependent": 0, "asked": 2}
    assert launch_on_host(2, 0) == b"invalid value"
    assert launch_on_host(2, 100)["dependent"] == 1
    assert [launch_on_host(64, v)["dependent"] for v in (90, 80, 120)] == [1, 0, 1]  # more devices than are remembered


@pytest.mark.parametrize("chosen, dependent", [("0", 0), ("1", 1)])
def test_cuda_launches_as_asked(launch_on_host, monkeypatch, chosen, dependent):
    monkeypatch.setenv("FASTDIFF_PDL", chosen)
    assert launch_on_host(0, 90, cluster=2)["dependent"] == dependent


@pytest.fixture
def module():
    pytest.importorskip("triton")
    return importlib.import_module("fastdiff.kernels.dependent")


def test_keywords(module, monkeypatch):
    monkeypatch.delenv("FASTDIFF_PDL", raising=False)
    for capability in ((9, 0), (10, 0), (10, 3), (12, 0)):
        assert module.keywords(capability) == {"PDL": True, "launch_pdl": True}
    for capability in ((7, 5), (8, 0), (8, 9)):
        assert module.keywords(capability) == {"PDL": False}
    monkeypatch.setenv("FASTDIFF_PDL", "1")
    assert module.keywords((9, 0))["PDL"]
    monkeypatch.setenv("FASTDIFF_PDL", "0")
    assert module.keywords((9, 0)) == {"PDL": False}


@pytest.mark.parametrize(
    "device, hip, compiled, expected",
    [
        ("cuda", None, True, True),
        ("cpu", None, True, False),
        ("cuda", "7.0", True, False),  # whose devices call themselves 9.4
        ("cuda", None, False, False),
    ],
    ids=["GPU", "CPU", "ROCm", "interpreter"],
)
def test_where(module, monkeypatch, device, hip, compiled, expected):
    monkeypatch.delenv("FASTDIFF_PDL", raising=False)
    monkeypatch.setattr(module.triton, "JITFunction", type(module.begin) if compiled else str)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert module._of_device.__wrapped__(torch.device(device, 0)).get("launch_pdl", False) is expected


def test_the_interpreter_and_the_cpu_do_without(module):
    assert module.dependent(torch.empty(1)) == {"PDL": False}


def test_unguarded():
    """A branch around the wait, an early end, a wait that some threads do not make, routines, a jump that leads anywhere."""

    def found(*code):
        return machine_code.unguarded([f"{16 * i:04x} {instruction}" for i, instruction in enumerate(code)])

    assert found("LDC R1, c[0x0][0x28]", "ACQBULK", "PREEXIT", "@P0 EXIT", "LDG.E R4, desc[UR4][R2.64]", "EXIT") == []
    assert found("@P0 BRA 0x20", "BAR.SYNC 0x0", "ACQBULK", "PREEXIT", "LDG.E R4, [R2.64]", "EXIT") == []
    assert found("@P0 BRA 0x20", "ACQBULK", "STG.E [R2.64], R4", "EXIT") == ["0020 STG.E [R2.64], R4", "0030 EXIT"]
    assert found("BRA.U UP0, 0x20", "ACQBULK", "RED.E [R2.64], R4", "EXIT") == ["0020 RED.E [R2.64], R4", "0030 EXIT"]
    assert found("@P0 EXIT", "ACQBULK", "EXIT") == ["0000 @P0 EXIT"]
    assert found("@P0 ACQBULK", "LDGSTS.E.128 [R2], [R4.64]", "EXIT") == ["0010 LDGSTS.E.128 [R2], [R4.64]", "0020 EXIT"]
    assert found("PREEXIT", "ACQBULK", "EXIT") == ["0000 PREEXIT"]
    assert found("CALL.REL.NOINC 0x30", "ACQBULK", "EXIT", "BPT.TRAP 0x1", "RET.REL.NODEC R4 0x0") == []
    routine = "CALL.REL.NOINC 0x30", "ACQBULK", "EXIT", "LDG.E R4, [R2.64]", "RET.REL.NODEC R6 0x0"
    assert found(*routine) == ["0030 LDG.E R4, [R2.64]"]
    assert found("BRX R2 -0x20", "ACQBULK", "EXIT") == ["0000 BRX R2 -0x20"]
    assert found("LDG.E R4, [R2.64]", "EXIT") == ["0000 LDG.E R4, [R2.64]", "0010 EXIT"]


def chain(kernels, x, seeds, between):
    """Kernels one behind the other, each reading what the one in front of it wrote, in memory given back on the way."""
    norm, noise, forms = kernels
    n, c = x.shape[:2]
    weight, bias, per = (
        torch.full(size, value, device=x.device) for size, value in (((c,), 1.5), ((c,), 0.25), ((n, c), 0.5))
    )
    coefficients = torch.tensor([0.75, 0.5], device=x.device).expand(n, 1, 2)
    for draw in range(6):
        h, stats = norm(x, weight, bias, 4, 1e-5, per, per, per, None, True)
        between()
        again, _ = norm(x, weight, bias, 4, 1e-5, per, per, per, stats, True)
        between()
        z = noise(seeds, draw, 0, list(x.shape[1:]), x.dtype)
        between()
        x = forms(h, seeds, coefficients, draw, 1)[0] + (again - z) * 0.125
        between()
    return x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches overlap on a GPU alone")
@pytest.mark.parametrize("by", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(1, 32, 8, 8), (2, 64, 64, 64)], ids=str)
def test_a_chain_gives_the_bits_of_kernels_one_at_a_time(by, shape):
    found = [_register.on_cuda(op) for op in ("group_norm_silu", "philox_normal", "add_noise")]
    if not all(by in each for each in found):
        pytest.skip("fastdiff._C was built without CUDA kernels")
    kernels = [each[by] for each in found]
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last)
    seeds = seed_tensor(range(shape[0]), "cuda")
    want = chain(kernels, x, seeds, torch.cuda.synchronize)
    for _ in range(20):
        assert torch.equal(chain(kernels, x, seeds, lambda: None), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain(kernels, x, seeds, lambda: None)
    for _ in range(20):
        made.zero_()
        graph.replay()
        assert torch.equal(made, want)

"""The build: what is asked of pip, what is compiled, what comes out, and that every op has its files."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("fastdiff/ops/{}.py", "tests/ops/test_{}.py", "kernels/triton/{}.py", "csrc/cpu/{}.cpp", "benchmarks/bench_{}.py")
OPS = (
    "philox_normal",
    "add_noise",
    "denoise_step",
    "schedule_coefficients",
    "langevin_step",
    "group_norm_silu",
    "group_norm_attention",
    "resample",
    "embedding",
    "conv3x3",
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "build_support" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend():
    return load("fastdiff_backend")


@pytest.fixture
def native():
    return load("native")


@pytest.fixture
def no_torch(monkeypatch, backend, tmp_path):
    """An isolated build: torch cannot be imported, and tmp_path is the environment's site-packages."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "site_packages", lambda: [str(tmp_path)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FASTDIFF_BUILD", raising=False)
    return tmp_path


def test_torch_is_required_where_it_is_absent(backend, no_torch):
    assert backend.torch_requirement() == ["torch>=2.11"]
    assert "torch>=2.11" in backend.get_requires_for_build_editable() + backend.get_requires_for_build_wheel()


def test_torch_of_the_environment_is_used(backend, no_torch):
    (no_torch / "torch" / "include").mkdir(parents=True)
    assert backend.torch_requirement() == []
    assert sys.path[-1] == str(no_torch), "appended: the isolated environment's own packages come first"


def test_nothing_is_required_to_compile_nothing(backend, no_torch, monkeypatch):
    monkeypatch.setenv("FASTDIFF_BUILD", "none")
    assert backend.torch_requirement() == []


def test_metadata_and_sdist_need_no_torch(backend, no_torch):
    assert not any("torch" in r for r in backend.get_requires_for_build_sdist())


@pytest.mark.parametrize("choice", ["auto", "cpu", "cuda", "none"])
def test_fastdiff_build(native, monkeypatch, choice):
    monkeypatch.setenv("FASTDIFF_BUILD", choice)
    assert native.build_choice() == choice


def test_fastdiff_build_is_validated(native, monkeypatch):
    monkeypatch.setenv("FASTDIFF_BUILD", "gpu")
    with pytest.raises(SystemExit, match="FASTDIFF_BUILD: 'gpu' is not known; use one of auto, cpu, cuda, none"):
        native.build_choice()


def test_a_missing_compiler_is_named(native, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler .*apt install g\+\+.*FASTDIFF_BUILD=none"):
        native.require_compiler()


def test_without_nvcc_only_the_cpu_is_built(native, monkeypatch, tmp_path):
    assert "nvcc was not found" in native.why_no_cuda(tmp_path)
    monkeypatch.setattr(native, "cuda_home", lambda: None)
    monkeypatch.chdir(ROOT)
    extension = native.extension("auto")
    assert not [s for s in extension.sources if s.endswith(".cu")] and "cudart" not in extension.libraries
    with pytest.raises(SystemExit, match="FASTDIFF_BUILD=cuda: nvcc was not found"):
        native.extension("cuda")


@pytest.mark.parametrize("version, reason", [(None, "without CUDA"), ("1.0", "major versions differ")])
def test_a_toolkit_that_does_not_fit_is_explained(native, monkeypatch, version, reason):
    home = native.cuda_home()
    if home is None or not (home / "bin" / "nvcc").exists():
        pytest.skip("nvcc is not here")
    import torch

    monkeypatch.setattr(torch.version, "cuda", version)
    assert reason in native.why_no_cuda(home)


def test_extension_loads_and_tells_what_it_is():
    _C = pytest.importorskip("fastdiff._C", reason="fastdiff._C is not built (FASTDIFF_BUILD=none)")
    from fastdiff.ops import _register

    assert Path(_C.__file__).name.startswith("_C.abi3."), "one build serves every Python from 3.10 on"
    assert _register.native_error is None
    assert _C.BUILT.startswith(("cpu,", "cpu+cuda,"))
    assert _C.isa() in _C.isas() and _C.isas()[0] == "baseline"
    assert all(_register.serving(op, "cpu") == "c++" for op in (*OPS, "group_norm_silu_backward"))


def test_instruction_set_can_be_lowered_and_is_validated():
    _C = pytest.importorskip("fastdiff._C", reason="fastdiff._C is not built (FASTDIFF_BUILD=none)")
    with pytest.raises(ValueError, match="FASTDIFF_ISA: 'avx9' is not known; use baseline"):
        _C.use_isa("avx9")
    command = [sys.executable, "-c", "import torch; from fastdiff import _C; print(_C.isa())"]

    def run(isa):
        return subprocess.run(command, env={**os.environ, "FASTDIFF_ISA": isa}, capture_output=True, text=True)

    assert run("baseline").stdout.strip() == "baseline"
    assert "FASTDIFF_ISA: 'avx9' is not known" in run("avx9").stderr


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", PLACES)
def test_one_op_one_word(op, place):
    assert (ROOT / place.format(op)).is_file()


def test_torch_headers_only_where_the_bridge_is():
    with_torch = [
        p.name
        for p in (ROOT / "csrc").rglob("*")
        if p.is_file() and re.search(r"#include\s*[<\"](torch|ATen|c10)/", p.read_text())
    ]
    assert with_torch == ["bridge.h"]


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 60

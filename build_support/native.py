"""What setup.py compiles: the choice of FASTDIFF_BUILD and the flags of `fastdiff._C`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHOICES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = ("80", "90", "100")
# The oldest torch whose stable ABI we use; the extension then loads in every newer one.
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
# No contraction: the noise must round the same way everywhere. GCC 12 calls its own AVX-512 headers maybe uninitialized.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def build_choice() -> str:
    choice = os.environ.get("FASTDIFF_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"FASTDIFF_BUILD: {choice!r} is not known; use one of {', '.join(CHOICES)}")
    return choice


def require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        sys.exit(
            f"fastdiff: no C++ compiler ({compiler}) found. Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install "
            "gcc-c++; conda: conda install gxx), or set FASTDIFF_BUILD=none for the plain-torch package, which is slower."
        )


def why_no_cuda() -> str | None:
    """None where the CUDA sources can be built, else the reason."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = CUDA_HOME and Path(CUDA_HOME) / "bin" / "nvcc"
    if not nvcc or not nvcc.exists():
        return "nvcc was not found (on PATH or under CUDA_HOME)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1] if release else '?'}, torch is CUDA {torch.version.cuda}: major versions differ"
    with tempfile.TemporaryDirectory() as folder:  # finds a host compiler or headers that do not fit before they break the build
        probe = Path(folder, "probe.cu")
        probe.write_text("__global__ void probe() {}\n")
        tried = subprocess.run([nvcc, "-c", probe, "-o", probe.with_suffix(".o")], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"nvcc does not compile here: {tried.stderr.strip().splitlines()[-1:]}"


def architectures() -> list[str]:
    """-gencode flags for what this nvcc knows of ours; the last also as PTX for newer GPUs. TORCH_CUDA_ARCH_LIST overrides."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    from torch.utils.cpp_extension import CUDA_HOME

    listed = subprocess.run([Path(CUDA_HOME) / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [a for a in ARCHITECTURES if f"compute_{a}" in listed.split()]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def extension(choice: str):
    """The setuptools Extension of `fastdiff._C`."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    reason = "FASTDIFF_BUILD=cpu" if choice == "cpu" else why_no_cuda()
    if choice == "cuda" and reason:
        sys.exit(f"FASTDIFF_BUILD=cuda: {reason}. Install the CUDA toolkit that fits torch, or use FASTDIFF_BUILD=auto.")
    cuda = reason is None
    what = "CPU and CUDA kernels" if cuda else f"CPU kernels only: {reason}. GPUs are served by Triton, which needs no nvcc"
    print(f"fastdiff: building {what}", file=sys.stderr)
    sources = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")]))
    target = TARGET if cuda else TARGET[:1]
    cxx = [*target, *CXX_FLAGS, f'-DFASTDIFF_BUILT_WITH="{"cpu+cuda" if cuda else "cpu"}"']
    nvcc = [*target, "-O3", "--fmad=false", "-Xptxas=-warn-spills", *(architectures() if cuda else [])]
    if cuda:
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    return (CUDAExtension if cuda else CppExtension)(
        "fastdiff._C",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
    )

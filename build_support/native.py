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
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No contraction: the noise must round the same way everywhere. GCC 12 calls its own AVX-512 headers maybe uninitialized.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def build_choice() -> str:
    choice = os.environ.get("FASTDIFF_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"FASTDIFF_BUILD: {choice!r} is not known; use one of {', '.join(CHOICES)}")
    return choice


def require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        sys.exit(
            f"fastdiff: no C++ compiler ({compiler}) found. Install one (Debian, Ubuntu: apt install g++; Fedora: "
            "dnf install gcc-c++; conda: conda install gxx), or set FASTDIFF_BUILD=none for the slower plain-torch package."
        )


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, the nvcc on PATH (maybe a wrapper: ask it), or the wheel's beside torch."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    if nvcc := shutil.which("nvcc"):
        told = re.search(r"TOP=(.*)", subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr)
        return Path(told[1].strip()).resolve() if told else Path(nvcc).parent.parent
    import torch

    return next(iter(sorted(p.parent.parent for p in Path(torch.__file__).parents[1].glob("nvidia/cu*/bin/nvcc"))), None)


def why_no_cuda(home: Path | None) -> str | None:
    """None where the CUDA sources can be built with the toolkit at `home`, else the reason."""
    import torch

    if not home or not (home / "bin" / "nvcc").exists():
        return f"nvcc was not found ({home or 'PATH'}; pip install nvidia-cuda-nvcc brings one)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    nvcc = home / "bin" / "nvcc"
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release[1] if release else '?'}, torch is CUDA {torch.version.cuda}: major versions differ"
    if not runtime(home):
        return f"no libcudart under {home} or beside torch"
    with tempfile.TemporaryDirectory() as folder:  # a host compiler or headers that do not fit show here, not in mid-build
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_bf16.h>\n__global__ void probe() {}\n")
        tried = subprocess.run([nvcc, "-c", probe, "-o", probe.with_suffix(".o")], capture_output=True, text=True)
    if tried.returncode == 0:
        return None
    return f"nvcc does not compile here: {(tried.stderr.strip().splitlines() or ['?'])[-1]}"


def runtime(home: Path) -> Path | None:
    """libcudart: the toolkit's, else the one that torch loads."""
    import torch

    found = [*home.glob("lib64/libcudart.so*"), *home.glob("lib/libcudart.so*"), *home.glob("targets/*/lib/libcudart.so*")]
    found += Path(torch.__file__).parents[1].glob(f"nvidia/cu{torch.version.cuda.split('.')[0]}/lib/libcudart.so*")
    return next(iter(found), None)


def architectures(home: Path) -> list[str]:
    """-gencode flags for those that this nvcc knows, the last also as PTX for newer GPUs. TORCH_CUDA_ARCH_LIST overrides."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    listed = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [a for a in ARCHITECTURES if f"compute_{a}" in listed.split()]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def extension(choice: str):
    """The setuptools Extension of `fastdiff._C`."""
    home = cuda_home() if choice != "cpu" else None
    reason = "FASTDIFF_BUILD=cpu" if choice == "cpu" else why_no_cuda(home)
    if choice == "cuda" and reason:
        sys.exit(f"FASTDIFF_BUILD=cuda: {reason}. Install the CUDA toolkit that fits torch, or use FASTDIFF_BUILD=auto.")
    cuda = reason is None
    what = "CPU and CUDA kernels" if cuda else f"CPU kernels only: {reason}. GPUs are served by Triton, which needs no nvcc"
    print(f"fastdiff: building {what}", file=sys.stderr)
    if cuda:
        os.environ["CUDA_HOME"] = str(home)  # read when torch's module is imported
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(map(str, (p for folder in ("csrc", "csrc/bridge", "csrc/cpu") for p in Path(folder).glob("*.cpp"))))
    built_with = f'-DFASTDIFF_BUILT_WITH="{"cpu+cuda" if cuda else "cpu"}"'
    options = {"extra_compile_args": {"cxx": [TARGET, *CXX_FLAGS, built_with]}}
    if cuda:
        sources += sorted(map(str, Path("csrc/cuda").glob("*.cu")))
        options["extra_compile_args"]["cxx"] += ["-DUSE_CUDA"]
        options["extra_compile_args"]["nvcc"] = ["-O3", "--fmad=false", "-Xptxas=-warn-spills", *architectures(home)]
        found = runtime(home)
        options["library_dirs"] = [str(found.parent)]
    built = (CUDAExtension if cuda else CppExtension)(
        "fastdiff._C", sources, include_dirs=[str(Path("csrc").resolve())], py_limited_api=True, **options
    )
    if cuda:  # the wheels' libcudart has no name without version, which -lcudart looks for
        built.libraries = [f":{found.name}" if name == "cudart" else name for name in built.libraries]
    return built

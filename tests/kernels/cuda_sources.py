"""The CUDA C++ sources of csrc/cuda and what nvcc makes of them on this machine, with or without a GPU."""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from machine_code import cuobjdump, examine

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def _native():
    spec = importlib.util.spec_from_file_location("native", ROOT / "build_support" / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def nvcc() -> Path | None:
    home = _native().cuda_home()
    return home / "bin" / "nvcc" if home and (home / "bin" / "nvcc").exists() else None


def why_not() -> str | None:
    """Why the sources cannot be compiled and read here."""
    if nvcc() is None:
        return "nvcc is not here"
    return None if cuobjdump() else "cuobjdump is neither in Triton's wheel nor on PATH"


@functools.cache
def architectures() -> list[int]:
    """Those of the build that this nvcc knows."""
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [int(a) for a in _native().ARCHITECTURES if f"compute_{a}" in listed]


KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(([^;{]*?)\)\s+)?(\w+)\s*\(")


def kernel_names(source: Path) -> list[str]:
    return [name for _, name in KERNEL.findall(source.read_text())]


def threads(source: Path) -> dict[str, int]:
    """kernel -> the threads of its __launch_bounds__, a number or a constant that it or its headers set to one; 0: none."""
    headers = source.parent.glob(f"{source.stem}*.h")
    text, found = "\n".join(path.read_text() for path in (source, *headers)), {}
    for bounds, name in KERNEL.findall(text):
        bound = bounds.split(",")[0].strip()
        constant = re.search(rf"\b{bound}\s*=\s*(\d+)\s*;", text) if bound.isidentifier() else None
        found[name] = int(bound) if bound.isdigit() else int(constant[1]) if constant else 0
    return found


def demangled(function: str) -> str:
    """Name and template arguments, by binutils' c++filt, which comes with g++; the mangled name without it."""
    tool = shutil.which("c++filt")
    if tool is None:
        return function
    text = subprocess.run([tool, function], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\b\w+::", "", re.sub(r"(?<=[\w>])\(.*$", "", text))


def command() -> list:
    return [nvcc(), "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}"]


def facts(source: Path, folder: Path, only: list[int] | None = None) -> list[dict]:
    """machine_code.examine of the source compiled as the build does, with the kernel's name in the source."""
    out = folder / f"{source.stem}.fatbin"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in only or architectures()]
    subprocess.run([*command(), "--fmad=false", *codes, "-fatbin", source, "-o", out], check=True)
    names = kernel_names(source)
    made = examine(out)
    for fact in made:
        fact["kernel"] = next(name for name in names if f"{len(name)}{name}" in fact["function"])
    return made

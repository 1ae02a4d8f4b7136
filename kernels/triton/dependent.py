"""Programmatic dependent launch: a kernel's blocks are placed on the GPU while the kernel in front of it still runs.

A kernel launched so may begin before the one in front has ended. Until `griddepcontrol.wait` returns, what that one writes
need not be there, and what it reads must not be overwritten. Hence the rule: every program of every kernel that is launched
waits before its first access to global memory, loads of weights included (training writes them) and stores included (the
allocator hands out again what the kernel in front still reads). Then, at once, it lets the next kernel be placed: that one
waits for the end of this one, which had waited for all before it. Other libraries' kernels, launched without, are ordered
as ever, in front of ours and behind; a captured graph keeps the order as an edge of its own kind.

Tensor memory (sm_100) is taken at a kernel's entry, before it lets the next one be placed: a block that waits for the kernel
in front never holds what that one is still to take.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """The first statement of a kernel that is launched, and of no other function."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def keywords(capability: tuple[int, int]) -> dict[str, bool]:
    """What a launch for this compute capability passes to the kernel and to Triton; FASTDIFF_PDL=0: as for older GPUs."""
    if capability < (9, 0) or os.environ.get("FASTDIFF_PDL") == "0":
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@functools.cache
def _of_device(device: torch.device) -> dict[str, bool]:
    compiled = isinstance(begin, triton.JITFunction)  # the interpreter knows no such launch
    if device.type != "cuda" or torch.version.hip is not None or not compiled:
        return {"PDL": False}
    return keywords(torch.cuda.get_device_capability(device))


def dependent(t: torch.Tensor) -> dict[str, bool]:
    """The keywords of every launch on t's device."""
    return _of_device(t.device)

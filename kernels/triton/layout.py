"""How the launchers look at a tensor's memory, and what they share on the host."""

import torch
import triton

from fastdiff.ops import _register


def collapse(t: torch.Tensor, first: int) -> int | None:
    """Stride with which dimensions first, first + 1, ... of t run as one dimension; None if they do not."""
    stride, run = None, None
    for size, step in zip(reversed(t.shape[first:]), reversed(t.stride()[first:]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != run:
            return None
        run = step * size
    return 1 if stride is None else stride


def planes(t: torch.Tensor) -> tuple[int, int, int] | None:
    """Strides (sample, channel, pixel) of t [N, C, ...]; None if its pixels have no single stride."""
    pixel = collapse(t, 2)
    return None if pixel is None else (t.stride(0), t.stride(1), pixel)


def walk(tensors: list[torch.Tensor]) -> tuple[int, int, list[tuple[int, int, int]]] | None:
    """One way through tensors of one shape [B, ...] in steps of four logical elements: (channels, pixels, strides of each).

    A sample whose elements lie in logical order everywhere is one channel. Otherwise four neighbouring pixels of a channel
    must share a Philox block, which takes a multiple of 4 pixels. None: make the tensors contiguous first.
    """
    shape = tensors[0].shape
    if all(collapse(t, 1) == 1 for t in tensors):
        return 1, shape[1:].numel(), [(t.stride(0), 0, 1) for t in tensors]
    if len(shape) < 3 or shape[2:].numel() % 4:
        return None
    strides = [planes(t) for t in tensors]
    return None if None in strides else (shape[1], shape[2:].numel(), strides)


def tile(channels: int, pixels: int, blocks: int = 256) -> tuple[int, int, int, int]:
    """(channels per program, Philox blocks per channel and program, tiles over channels, tiles over pixels)."""
    c = min(triton.next_power_of_2(channels), 32)
    q = blocks // c
    return c, q, triton.cdiv(channels, c), triton.cdiv(pixels, 4 * q)


def signed32(word: int) -> int:
    """The int32 with the bits of a 32-bit word, so that a kernel's argument has one type whatever its value."""
    return (word + 2**31) % 2**32 - 2**31


def check_float64(name: str) -> None:
    """float64 is computed by the reference, which FASTDIFF_STRICT=1 refuses."""
    if _register.strict():
        raise RuntimeError(
            f"fastdiff::{name} has no float64 Triton kernel and FASTDIFF_STRICT=1 forbids its plain-torch reference; "
            f"use float32, or unset FASTDIFF_STRICT"
        )

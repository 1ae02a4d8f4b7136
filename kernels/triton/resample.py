"""resample in Triton: polyphase, so that only the taps that meet an element of x are multiplied, both axes in one kernel.

y[o] = sum_j taps[tap + j up] x[index - j] per axis, with index and tap the quotient and rest of (down o + T - 1 - p0) / up.
Channels-last tiles are [pixels, channels], others [channels, pixels]: their fastest axis is the fastest in memory.
"""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.layout import check_float64
from fastdiff.ops._layout import image
from fastdiff.ops.resample import reference

TILE = 2048  # elements of y a program
UNROLLED = 4  # taps an element up to which the loop along a row is unrolled


@triton.jit
def _weight(taps, tap, j, UP: tl.constexpr, COUNT: tl.constexpr):
    """taps[tap + j UP], 0 past the last; a scalar or one of two where that is all there is."""
    if UP == 1:
        weight = tl.load(taps + j).to(tl.float32)
    elif UP == 2:
        even = tl.load(taps + 2 * j).to(tl.float32)
        odd = tl.load(taps + 2 * j + 1, mask=2 * j + 1 < COUNT, other=0.0).to(tl.float32)
        weight = tl.where(tap == 0, even, odd)
    else:
        k = tap + j * UP
        weight = tl.load(taps + k, mask=k < COUNT, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _met(x, taps, at, tap, row, inside, w, x_w, UP: tl.constexpr, COUNT: tl.constexpr, j):
    """One tap along the row: its weight times x at `row` (addresses of x[n, c, row, 0]) and column at - j."""
    column = at - j
    v = tl.load(x + (row + column.to(tl.int64) * x_w), mask=inside & (column >= 0) & (column < w), other=0.0)
    return v.to(tl.float32) * _weight(taps, tap, j, UP, COUNT)


@triton.jit
def _line(x, taps, at, tap, row, inside, w, x_w, UP: tl.constexpr, COUNT: tl.constexpr, UNROLLED: tl.constexpr):
    HITS: tl.constexpr = (COUNT + UP - 1) // UP
    total = _met(x, taps, at, tap, row, inside, w, x_w, UP, COUNT, 0)
    if HITS <= UNROLLED:
        for j in tl.static_range(1, HITS):
            total += _met(x, taps, at, tap, row, inside, w, x_w, UP, COUNT, j)
    else:
        for j in range(1, HITS):
            total += _met(x, taps, at, tap, row, inside, w, x_w, UP, COUNT, j)
    return total


@triton.jit
def _pixel(
    x,
    taps,  # [COUNT]
    plane,  # offsets of x[n, c, 0, 0]
    known,
    p,  # numbers of y's pixels
    out_w,
    start,
    skipped,
    h,
    w,
    x_h,
    x_w,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    COUNT: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """A tile of y; plane and known broadcast against p."""
    HITS: tl.constexpr = (COUNT + UP - 1) // UP
    # start = T - 1 - p0 + UP skipped >= 0: quotient and rest of non-negative numbers
    above, left = p // out_w * DOWN + start, p % out_w * DOWN + start
    first_y, first_x = above // UP - skipped, left // UP - skipped
    tap_y, tap_x = above % UP, left % UP
    row = plane + first_y.to(tl.int64) * x_h
    inside = known & (first_y >= 0) & (first_y < h)
    total = _weight(taps, tap_y, 0, UP, COUNT) * _line(x, taps, first_x, tap_x, row, inside, w, x_w, UP, COUNT, UNROLLED)
    if HITS <= 2:  # more rows at once would not fit in registers
        for j in tl.static_range(1, HITS):
            row -= x_h
            inside = known & (first_y >= j) & (first_y < h + j)
            line = _line(x, taps, first_x, tap_x, row, inside, w, x_w, UP, COUNT, UNROLLED)
            total += _weight(taps, tap_y, j, UP, COUNT) * line
    else:
        for j in range(1, HITS):
            row -= x_h
            inside = known & (first_y >= j) & (first_y < h + j)
            line = _line(x, taps, first_x, tap_x, row, inside, w, x_w, UP, COUNT, UNROLLED)
            total += _weight(taps, tap_y, j, UP, COUNT) * line
    return total


@triton.jit
def _numbers(first, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    return (first.to(tl.int64) if WIDE else first) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _resample_last(
    x,  # [N, C, H, W] by strides x_*
    taps,
    y,  # [N, C, out_h, out_w], channels-last without gaps
    channels,
    pixels,
    out_w,
    tiles_c,
    tiles_p,
    start,
    skipped,
    h,
    w,
    x_n,
    x_c,
    x_h,
    x_w,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    COUNT: tl.constexpr,
    UNROLLED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    n = (program // tiles_p // tiles_c).to(tl.int64)
    c = program // tiles_p % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    p = _numbers(program % tiles_p, BLOCK_P, WIDE)[:, None]
    known = (c < channels) & (p < pixels)
    r = _pixel(
        x, taps, n * x_n + c * x_c, known, p, out_w, start, skipped, h, w, x_h, x_w, UP, DOWN, COUNT, UNROLLED
    )  # fmt: skip
    tl.store(y + ((n * pixels + p.to(tl.int64)) * channels + c), r.to(y.dtype.element_ty), mask=known)


@triton.jit
def _resample_rows(
    x,  # [N, C, H, W] by strides x_*
    taps,
    y,  # [N, C, out_h, out_w], contiguous
    channels,
    pixels,
    out_w,
    tiles_c,
    tiles_p,
    start,
    skipped,
    h,
    w,
    x_n,
    x_c,
    x_h,
    x_w,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    COUNT: tl.constexpr,
    UNROLLED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    n = (program // tiles_p // tiles_c).to(tl.int64)
    c = program // tiles_p % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None].to(tl.int64)
    p = _numbers(program % tiles_p, BLOCK_P, WIDE)[None, :]
    known = (c < channels) & (p < pixels)
    r = _pixel(
        x, taps, n * x_n + c * x_c, known, p, out_w, start, skipped, h, w, x_h, x_w, UP, DOWN, COUNT, UNROLLED
    )  # fmt: skip
    tl.store(y + ((n * channels + c) * pixels + p.to(tl.int64)), r.to(y.dtype.element_ty), mask=known)


def resample(x, taps, up, down, p0, height, width):
    """y; bytes moved: x read once from device memory (again from cache for every tap), y written once."""
    if x.dtype == torch.float64:
        check_float64("resample")
    y = image(x, x.shape[1], height, width)
    if y.numel() == 0:
        return y
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference(x, taps, up, down, p0, height, width)
    n, c, h, w = x.shape
    last = y.stride(1) == 1 and y.stride(3) != 1
    pixels = height * width
    if last:
        block_c = min(triton.next_power_of_2(c), 64)
        block_p = min(triton.next_power_of_2(pixels), TILE // block_c)
    else:
        block_p = min(triton.next_power_of_2(pixels), TILE // 2)  # its narrow loads hold more registers
        block_c = min(triton.next_power_of_2(c), TILE // 2 // block_p)
    start = taps.shape[0] - 1 - p0
    skipped = max(0, -(start // up))
    tiles_c, tiles_p = triton.cdiv(c, block_c), triton.cdiv(pixels, block_p)
    # Pixels' numbers and positions are 32 bits wide where all fit: 64-bit division is slow.
    wide = max(pixels, down * max(height, width) + start + up * skipped, h, w) + TILE >= 2**31
    (_resample_last if last else _resample_rows)[(n * tiles_c * tiles_p,)](
        x, taps.contiguous(), y, c, pixels, width, tiles_c, tiles_p, start + up * skipped, skipped, h, w, *x.stride(),
        UP=up, DOWN=down, COUNT=taps.shape[0], UNROLLED=UNROLLED, WIDE=wide, BLOCK_C=block_c, BLOCK_P=block_p,
        num_warps=min(4, max(1, block_c * block_p // 256)), enable_fp_fusion=True, **dependent(x),
    )  # fmt: skip
    return y

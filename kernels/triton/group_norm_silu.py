"""group_norm_silu in Triton: a slice that fits on chip is read once; a larger one is cut into chunks that two kernels share.

Variance is the mean of (v - mean)^2: within a tile by two passes over registers, between tiles and chunks by Chan's merge,
always in the same order.
"""

import torch
import triton
import triton.language as tl

from fastdiff.kernels import group_norm as gn
from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.group_norm import (
    affine,
    inverse_sigmoid,
    over_pixels,
    over_tile,
    pair_of,
    reciprocal_std,
    rounded,
    shifted,
    store_pair,
    sum_groups,
    sum_pixels,
    to_channels,
    window,
)
from fastdiff.kernels.layout import check_float64, planes
from fastdiff.ops.group_norm_silu import reference


@triton.jit
def _finish(v, mean, rstd, gain, offset, SILU: tl.constexpr, PRECISE: tl.constexpr, LAST: tl.constexpr):
    """y of a tile v; mean, rstd, gain, offset [BLOCK_W]."""
    h = (v - over_tile(mean, LAST)) * over_tile(rstd, LAST)
    s = h * over_tile(gain, LAST) + over_tile(offset, LAST)
    if SILU:
        bottom = inverse_sigmoid(s, PRECISE)
        s = tl.div_rn(s, bottom) if PRECISE else s / bottom
    return s


@triton.jit
def _whole(
    x,  # [N, C, pixels] by strides x_*
    weight,  # [C]
    bias,
    add,  # [N, C]
    scale,
    shift,
    y,  # [N, C, pixels] by strides y_*
    stats,  # float32 [N, groups, 2]
    factor,  # float32 [1] of a y in E4M3, or None
    eps,
    groups,
    pixels,
    tiles_g,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
    CHANNELS: tl.constexpr,  # of one group
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    n = (tl.program_id(0) // tiles_g).to(tl.int64)
    first_g = tl.program_id(0) % tiles_g * BLOCK_G
    c, known, member = window(first_g, 0, groups, CHANNELS, BLOCK_G, BLOCK_W)
    nc = n * (groups * CHANNELS) + c
    p = tl.arange(0, BLOCK_P).to(tl.int64)
    inside = over_tile(known, LAST) & over_pixels(p < pixels, LAST)

    at = n * x_n + over_tile(c * x_c, LAST) + over_pixels(p * x_p, LAST)
    v = shifted(x, add, at, nc, inside, known, HAS_ADD, LAST)
    count = CHANNELS * pixels * 1.0
    mean_g = sum_groups(sum_pixels(v, LAST), member) / count
    mean = to_channels(mean_g, member)
    centred = tl.where(inside, v - over_tile(mean, LAST), 0.0)
    var_g = sum_groups(sum_pixels(centred * centred, LAST), member) / count
    store_pair(stats, n, first_g, groups, mean_g, var_g, BLOCK_G)

    gain, offset = affine(weight, bias, scale, shift, c, nc, known, HAS_SCALE, HAS_SHIFT)
    rstd = to_channels(reciprocal_std(var_g, eps), member)
    r = _finish(v, mean, rstd, gain, offset, SILU, PRECISE, LAST)
    to = n * y_n + over_tile(c * y_c, LAST) + over_pixels(p * y_p, LAST)
    tl.store(y + to, rounded(r, factor, y.dtype.element_ty), mask=inside)


@triton.jit
def _partial(
    x,
    add,
    partial,  # float32 [N, groups, chunks, 3]: count, mean, sum of (v - mean)^2
    groups,
    pixels,
    tiles_g,
    tiles_j,
    tiles,  # of a slice
    chunks,
    x_n,
    x_c,
    x_p,
    HAS_ADD: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    chunk = (program % chunks).to(tl.int64)
    n = (program // chunks // tiles_g).to(tl.int64)
    first_g = program // chunks % tiles_g * BLOCK_G
    per = (tiles + chunks - 1) // chunks
    count = 0.0
    mean = tl.zeros([BLOCK_G], tl.float32)
    m2 = tl.zeros([BLOCK_G], tl.float32)
    for t in range(chunk * per, tl.minimum(chunk * per + per, tiles)):
        first_j = t % tiles_j * BLOCK_W
        first_p = t // tiles_j * BLOCK_P
        c, known, member = window(first_g, first_j, groups, CHANNELS, BLOCK_G, BLOCK_W)
        p = first_p + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = over_tile(known, LAST) & over_pixels(p < pixels, LAST)
        at = n * x_n + over_tile(c * x_c, LAST) + over_pixels(p * x_p, LAST)
        v = shifted(x, add, at, n * (groups * CHANNELS) + c, inside, known, HAS_ADD, LAST)
        here = tl.minimum(CHANNELS - first_j, BLOCK_W) * tl.minimum(pixels - first_p, BLOCK_P) * 1.0
        m = sum_groups(sum_pixels(v, LAST), member) / here
        centred = tl.where(inside, v - over_tile(to_channels(m, member), LAST), 0.0)
        apart = m - mean
        both = count + here
        m2 += sum_groups(sum_pixels(centred * centred, LAST), member) + apart * apart * (count * here / both)
        mean += apart * (here / both)
        count = both
    own = first_g + tl.arange(0, BLOCK_G)
    to = partial + ((n * groups + own) * chunks + chunk) * 3
    tl.store(to, tl.zeros([BLOCK_G], tl.float32) + count, mask=own < groups)
    tl.store(to + 1, mean, mask=own < groups)
    tl.store(to + 2, m2, mask=own < groups)


@triton.jit
def _merge(partial, n, first_g, groups, chunks, BLOCK_G: tl.constexpr, MERGE: tl.constexpr):
    """Mean and variance of the tile's groups from all chunks."""
    own = first_g + tl.arange(0, BLOCK_G)[:, None]
    k = tl.arange(0, MERGE)[None, :]
    theirs = partial + ((n * groups + own) * chunks + k) * 3  # [BLOCK_G, MERGE]
    valid = (own < groups) & (k < chunks)
    count = tl.load(theirs, mask=valid, other=0.0)
    m = tl.load(theirs + 1, mask=valid, other=0.0)
    total = tl.maximum(tl.sum(count, axis=1), 1.0)
    mean = tl.sum(count * m, axis=1) / total
    apart = m - mean[:, None]
    m2 = tl.load(theirs + 2, mask=valid, other=0.0) + count * apart * apart
    return mean, tl.sum(m2, axis=1) / total


@triton.jit
def _apply(
    x,
    weight,
    bias,
    add,
    scale,
    shift,
    y,
    stats,  # written when MERGE > 0, read otherwise
    partial,
    factor,  # as in `_whole`
    eps,
    groups,
    pixels,
    tiles_g,
    tiles_j,
    tiles,
    chunks,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    MERGE: tl.constexpr,  # power of two >= chunks, or 0: stats are given
    HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    chunk = (program % chunks).to(tl.int64)
    n = (program // chunks // tiles_g).to(tl.int64)
    first_g = program // chunks % tiles_g * BLOCK_G
    per = (tiles + chunks - 1) // chunks
    if MERGE > 0:
        mean_g, var_g = _merge(partial, n, first_g, groups, chunks, BLOCK_G, MERGE)
        if chunk == 0:
            store_pair(stats, n, first_g, groups, mean_g, var_g, BLOCK_G)
    else:
        mean_g, var_g = pair_of(stats, n, first_g, groups, BLOCK_G)
    rstd_g = reciprocal_std(var_g, eps)
    for t in range(chunk * per, tl.minimum(chunk * per + per, tiles)):
        c, known, member = window(first_g, t % tiles_j * BLOCK_W, groups, CHANNELS, BLOCK_G, BLOCK_W)
        nc = n * (groups * CHANNELS) + c
        p = t // tiles_j * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = over_tile(known, LAST) & over_pixels(p < pixels, LAST)
        at = n * x_n + over_tile(c * x_c, LAST) + over_pixels(p * x_p, LAST)
        v = shifted(x, add, at, nc, inside, known, HAS_ADD, LAST)
        gain, offset = affine(weight, bias, scale, shift, c, nc, known, HAS_SCALE, HAS_SHIFT)
        r = _finish(v, to_channels(mean_g, member), to_channels(rstd_g, member), gain, offset, SILU, PRECISE, LAST)
        to = n * y_n + over_tile(c * y_c, LAST) + over_pixels(p * y_p, LAST)
        tl.store(y + to, rounded(r, factor, y.dtype.element_ty), mask=inside)


def group_norm_silu(x, weight, bias, groups, eps, add, scale, shift, stats, silu):
    """(y, stats); bytes moved: x read once where a slice fits on chip, twice otherwise, y written once."""
    if x.dtype == torch.float64:
        check_float64("group_norm_silu")
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference(x, weight, bias, groups, eps, add, scale, shift, stats, silu)
    y = torch.empty_like(x)
    result = gn.strided(y)
    stats = normalise(result, x, weight, bias, groups, eps, add, scale, shift, stats, silu)
    if result is not y:
        y.copy_(result)
    return y, stats


def normalise(y, x, weight, bias, groups, eps, add, scale, shift, stats, silu, factor=None):
    """Write y, x's shape by strides of its own; returns the statistics. factor: float32 [1], on what E4M3 y holds."""
    source, given = gn.strided(x), stats is not None
    if given:
        stats = stats.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    else:
        stats = x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)
    tensors = (source, weight.contiguous(), bias.contiguous(), *(gn.dense(t, source) for t in (add, scale, shift)))
    flags = {"HAS_ADD": add is not None, "HAS_SCALE": scale is not None, "HAS_SHIFT": shift is not None}
    flags |= {"SILU": silu, "PRECISE": x.dtype == torch.float32}
    shape = gn.shape_of(source, groups)
    with torch.cuda.device_of(x):
        if not given and shape.size <= gn.WHOLE:
            _whole[(shape.n * shape.tiles_g,)](
                *tensors, y, stats, factor, eps, groups, shape.pixels, shape.tiles_g, *planes(source), *planes(y),
                **flags, **shape.options(), **dependent(x),
            )  # fmt: skip
        else:
            _streamed(tensors, y, stats, factor, eps, groups, given, flags)
    return stats


def _streamed(tensors, y, stats, factor, eps, groups, given, flags):
    x = tensors[0]
    shape = gn.shape_of(x, groups, gn.STREAMED)
    tiles = shape.tiles_j * shape.tiles_p
    chunks = shape.chunks(tiles, shape.n * shape.tiles_g)
    grid = (shape.n * shape.tiles_g * chunks,)
    counts = (groups, shape.pixels, shape.tiles_g, shape.tiles_j, tiles, chunks)
    options = shape.options()
    partial = stats if given else stats.new_empty((shape.n, groups, chunks, 3))
    if not given:
        _partial[grid](x, tensors[3], partial, *counts, *planes(x), HAS_ADD=flags["HAS_ADD"], **options, **dependent(x))
    merge = 0 if given else triton.next_power_of_2(chunks)
    _apply[grid](
        *tensors, y, stats, partial, factor, eps, *counts, *planes(x), *planes(y),
        MERGE=merge, **flags, **options, **dependent(x),
    )  # fmt: skip

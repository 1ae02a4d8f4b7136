"""group_norm_silu_backward in Triton: every gradient from three sums per sample and channel, in an order fixed by the shape.

With s = gain h + offset, ds = dy silu'(s), and over the pixels of a channel  P0 = sum h,  P1 = sum ds,  P2 = sum ds h:

    dv     = rstd (gain ds - A - h B),   A = sum_c gain P1 / M,   B = sum_c gain P2 / M    over the M elements of the group
    dshift = P1,   dscale = w P2 + b P1,   dadd = sum dv = rstd (gain P1 - pixels A - B P0)
    dw     = sum_n (1 + scale) P2,   db = sum_n (1 + scale) P1
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
    shifted,
    sum_pixels,
    to_channels,
    window,
)
from fastdiff.kernels.layout import check_float64, planes
from fastdiff.ops.group_norm_silu import reference_backward


@triton.jit
def _ds(dy, s, SILU: tl.constexpr, PRECISE: tl.constexpr):
    """dy silu'(s)."""
    if SILU:
        bottom = inverse_sigmoid(s, PRECISE)
        sigma = tl.div_rn(1.0, bottom) if PRECISE else 1.0 / bottom
        dy = dy * (sigma * (1.0 + s * (1.0 - sigma)))
    return dy


@triton.jit
def _sums(
    dy,  # [N, C, pixels] by strides dy_*
    x,  # [N, C, pixels] by strides x_*
    weight,  # [C]
    bias,
    add,  # [N, C]
    scale,
    shift,
    stats,  # float32 [N, groups, 2]
    sums,  # float32 [N, chunks, C, 3]: P0, P1, P2 of a chunk of pixels
    eps,
    groups,
    pixels,
    tiles_g,
    tiles_j,
    tiles_p,
    chunks,
    dy_n,
    dy_c,
    dy_p,
    x_n,
    x_c,
    x_p,
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
    program = tl.program_id(0)
    chunk = (program % chunks).to(tl.int64)
    rest = program // chunks
    first_j = rest % tiles_j * BLOCK_W
    first_g = rest // tiles_j % tiles_g * BLOCK_G
    n = (rest // tiles_j // tiles_g).to(tl.int64)
    per = (tiles_p + chunks - 1) // chunks
    c, known, member = window(first_g, first_j, groups, CHANNELS, BLOCK_G, BLOCK_W)
    nc = n * (groups * CHANNELS) + c
    mean_g, var_g = pair_of(stats, n, first_g, groups, BLOCK_G)
    mean = over_tile(to_channels(mean_g, member), LAST)
    rstd = over_tile(to_channels(reciprocal_std(var_g, eps), member), LAST)
    gain, offset = affine(weight, bias, scale, shift, c, nc, known, HAS_SCALE, HAS_SHIFT)
    p0 = tl.zeros([BLOCK_W], tl.float32)
    p1 = tl.zeros([BLOCK_W], tl.float32)
    p2 = tl.zeros([BLOCK_W], tl.float32)
    for t in range(chunk * per, tl.minimum(chunk * per + per, tiles_p)):
        p = t * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = over_tile(known, LAST) & over_pixels(p < pixels, LAST)
        at = n * x_n + over_tile(c * x_c, LAST) + over_pixels(p * x_p, LAST)
        h = tl.where(inside, (shifted(x, add, at, nc, inside, known, HAS_ADD, LAST) - mean) * rstd, 0.0)
        top = n * dy_n + over_tile(c * dy_c, LAST) + over_pixels(p * dy_p, LAST)
        s = h * over_tile(gain, LAST) + over_tile(offset, LAST)
        ds = _ds(tl.load(dy + top, mask=inside, other=0.0).to(tl.float32), s, SILU, PRECISE)
        p0 += sum_pixels(h, LAST)
        p1 += sum_pixels(ds, LAST)
        p2 += sum_pixels(ds * h, LAST)
    to = sums + ((n * chunks + chunk) * groups * CHANNELS + c) * 3
    tl.store(to, p0, mask=known)
    tl.store(to + 1, p1, mask=known)
    tl.store(to + 2, p2, mask=known)


@triton.jit
def _fold(
    sums,
    weight,
    bias,
    scale,
    stats,
    group,  # float32 [N, groups, 2]: A, B
    outer,  # float32 [2, N, C]: terms of dw and db
    dadd,  # [N, C]
    dscale,
    dshift,
    eps,
    groups,
    pixels,
    chunks,
    HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per sample and group: chunks in order, then channels."""
    begin(PDL)
    n = (tl.program_id(0) // groups).to(tl.int64)
    g = tl.program_id(0) % groups
    wide = groups * CHANNELS
    j = tl.arange(0, BLOCK_J)
    known = j < CHANNELS
    c = g * CHANNELS + j
    nc = n * wide + c
    p0 = tl.zeros([BLOCK_J], tl.float32)
    p1 = tl.zeros([BLOCK_J], tl.float32)
    p2 = tl.zeros([BLOCK_J], tl.float32)
    source = sums + (n * chunks * wide + c) * 3
    for _ in range(0, chunks):
        p0 += tl.load(source, mask=known, other=0.0)
        p1 += tl.load(source + 1, mask=known, other=0.0)
        p2 += tl.load(source + 2, mask=known, other=0.0)
        source += wide * 3
    w = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    more = tl.full([BLOCK_J], 1.0, tl.float32)
    if HAS_SCALE:
        more += tl.load(scale + nc, mask=known, other=0.0).to(tl.float32)
    gain = w * more
    count = CHANNELS * pixels * 1.0
    a = tl.sum(gain * p1, axis=0) / count
    b = tl.sum(gain * p2, axis=0) / count
    tl.store(group + (n * groups + g) * 2, a)
    tl.store(group + (n * groups + g) * 2 + 1, b)
    tl.store(outer + nc, more * p2, mask=known)
    tl.store(outer + (tl.num_programs(0) // groups).to(tl.int64) * wide + nc, more * p1, mask=known)
    if HAS_ADD:
        rstd = reciprocal_std(tl.load(stats + (n * groups + g) * 2 + 1).to(tl.float32), eps)
        tl.store(dadd + nc, (rstd * (gain * p1 - pixels * a - p0 * b)).to(dadd.dtype.element_ty), mask=known)
    if HAS_SCALE:
        beta = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
        tl.store(dscale + nc, (w * p2 + beta * p1).to(dscale.dtype.element_ty), mask=known)
    if HAS_SHIFT:
        tl.store(dshift + nc, p1.to(dshift.dtype.element_ty), mask=known)


@triton.jit
def _dx(
    dy,
    x,
    weight,
    bias,
    add,
    scale,
    shift,
    stats,
    group,  # float32 [N, groups, 2]: A, B
    dx,  # [N, C, pixels] by strides dx_*
    eps,
    groups,
    pixels,
    tiles_g,
    tiles_j,
    tiles_p,
    dy_n,
    dy_c,
    dy_p,
    x_n,
    x_c,
    x_p,
    dx_n,
    dx_c,
    dx_p,
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
    program = tl.program_id(0)
    first_p = (program % tiles_p).to(tl.int64) * BLOCK_P
    rest = program // tiles_p
    first_g = rest // tiles_j % tiles_g * BLOCK_G
    n = (rest // tiles_j // tiles_g).to(tl.int64)
    c, known, member = window(first_g, rest % tiles_j * BLOCK_W, groups, CHANNELS, BLOCK_G, BLOCK_W)
    nc = n * (groups * CHANNELS) + c
    p = first_p + tl.arange(0, BLOCK_P)
    inside = over_tile(known, LAST) & over_pixels(p < pixels, LAST)
    mean_g, var_g = pair_of(stats, n, first_g, groups, BLOCK_G)
    mean = over_tile(to_channels(mean_g, member), LAST)
    rstd = over_tile(to_channels(reciprocal_std(var_g, eps), member), LAST)
    a_g, b_g = pair_of(group, n, first_g, groups, BLOCK_G)
    a = over_tile(to_channels(a_g, member), LAST)
    b = over_tile(to_channels(b_g, member), LAST)
    gain, offset = affine(weight, bias, scale, shift, c, nc, known, HAS_SCALE, HAS_SHIFT)
    gain, offset = over_tile(gain, LAST), over_tile(offset, LAST)

    at = n * x_n + over_tile(c * x_c, LAST) + over_pixels(p * x_p, LAST)
    h = (shifted(x, add, at, nc, inside, known, HAS_ADD, LAST) - mean) * rstd
    top = n * dy_n + over_tile(c * dy_c, LAST) + over_pixels(p * dy_p, LAST)
    ds = _ds(tl.load(dy + top, mask=inside, other=0.0).to(tl.float32), gain * h + offset, SILU, PRECISE)
    dv = rstd * (gain * ds - a - h * b)
    to = n * dx_n + over_tile(c * dx_c, LAST) + over_pixels(p * dx_p, LAST)
    tl.store(dx + to, dv.to(dx.dtype.element_ty), mask=inside)


def group_norm_silu_backward(dy, x, weight, bias, groups, eps, add, scale, shift, stats, silu):
    """(dx, dw, db, dadd, dscale, dshift), empty where absent; bytes moved: dy and x read twice, dx written once."""
    if x.dtype == torch.float64:
        check_float64("group_norm_silu_backward")
    if x.dtype == torch.float64 or x.numel() == 0:
        return reference_backward(dy, x, weight, bias, groups, eps, add, scale, shift, stats, silu)
    dx = torch.empty_like(x)
    given = (add, scale, shift)
    small = [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]
    dy, x, result = gn.strided(dy), gn.strided(x), gn.strided(dx)
    weight, bias, stats = weight.contiguous(), bias.contiguous(), stats.contiguous()
    add, scale, shift = (gn.dense(t, x) for t in given)
    has = dict(zip(("HAS_ADD", "HAS_SCALE", "HAS_SHIFT"), (t is not None for t in given), strict=True))
    shape = gn.shape_of(x, groups, gn.STREAMED)
    flags = {**has, "SILU": silu, "PRECISE": x.dtype == torch.float32, **shape.options()}
    counts = (groups, shape.pixels, shape.tiles_g, shape.tiles_j, shape.tiles_p)
    programs = shape.n * shape.tiles_g * shape.tiles_j
    chunks = shape.chunks(shape.tiles_p, programs)
    sums = stats.new_empty((shape.n, chunks, x.shape[1], 3))
    group, outer = torch.empty_like(stats), stats.new_empty((2, *x.shape[:2]))
    tensors = (dy, x, weight, bias, add, scale, shift, stats)
    with torch.cuda.device_of(x):
        _sums[(programs * chunks,)](*tensors, sums, eps, *counts, chunks, *planes(dy), *planes(x), **flags, **dependent(x))
        _fold[(shape.n * groups,)](
            sums, weight, bias, scale, stats, group, outer, *small, eps, groups, shape.pixels, chunks,
            **has, CHANNELS=shape.channels, BLOCK_J=triton.next_power_of_2(shape.channels), num_warps=1,
            enable_fp_fusion=True, **dependent(x),
        )  # fmt: skip
        _dx[(programs * shape.tiles_p,)](
            *tensors, group, result, eps, *counts, *planes(dy), *planes(x), *planes(result), **flags, **dependent(x)
        )
    if result is not dx:
        dx.copy_(result)
    dw, db = outer.sum(1)
    return dx, dw.to(weight.dtype), db.to(bias.dtype), *small

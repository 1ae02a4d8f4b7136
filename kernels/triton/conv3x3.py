"""conv3x3 in Triton by "fp8": one kernel writes h in E4M3, one multiplies it by the packed weights.

h lies channels-last, [N, pixels, I], a pixel beginning at a multiple of 16 bytes. The product is an implicit GEMM,
[N pixels, 9 I] by [9 I, O]: nothing is unfolded, a row of the left operand is read where its tap lies and is 0 outside the
image. Taps change fastest, so that the nine reads of nearly the same pixels follow each other and all but the first find
them in a cache.
"""

import torch
import triton
import triton.language as tl

from fastdiff.kernels import group_norm as gn
from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.group_norm_attention import merged, statistics
from fastdiff.kernels.group_norm_silu import normalise
from fastdiff.kernels.layout import planes
from fastdiff.ops import _fp8
from fastdiff.ops._layout import image
from fastdiff.ops.conv3x3 import composed


@triton.jit
def _moments(
    v, partial, n, chunk, chunks, first_o, outputs, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr
):
    """Count, mean and sum of squares about it of v's channel groups, to partial [N, groups, chunks, 3]."""
    GROUPS: tl.constexpr = BLOCK_O // CHANNELS
    of_channels = tl.sum(v, axis=0) / BLOCK_P
    apart = v - of_channels[None, :]
    squares = tl.reshape(tl.sum(apart * apart, axis=0), [GROUPS, CHANNELS])
    of_channels = tl.reshape(of_channels, [GROUPS, CHANNELS])
    mean = tl.sum(of_channels, axis=1) / CHANNELS
    apart = of_channels - mean[:, None]
    m2 = tl.sum(squares + BLOCK_P * (apart * apart), axis=1)
    groups = outputs // CHANNELS
    own = first_o // CHANNELS + tl.arange(0, GROUPS)
    to = partial + ((n * groups + own) * chunks + chunk) * 3
    tl.store(to, tl.full([GROUPS], BLOCK_P * CHANNELS, tl.float32), mask=own < groups)
    tl.store(to + 1, mean, mask=own < groups)
    tl.store(to + 2, m2, mask=own < groups)


@triton.jit
def _multiply(
    h,  # E4M3 [N, pixels, I], pixels `pitch` apart
    packed,  # E4M3 [O, row]: 9 taps of `pitch` bytes, then two float32 scales
    tails,  # float32 at the first of these scales, rows row / 4 apart
    bias,  # [O], or [N, O] with rows bias_n apart
    residual,  # [N, O, pixels] by strides r_*
    y,  # [N, O, pixels] by strides y_*
    partial,  # float32 [N, groups, chunks, 3], see `_moments`
    out_scale,
    height,
    width,
    total,  # N pixels
    outputs,
    pitch,
    row,
    bias_n,
    tiles_o,
    r_n,
    r_c,
    r_p,
    y_n,
    y_c,
    y_p,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHANNELS: tl.constexpr,  # of a group whose moments are taken, 0 for none
    ALONE: tl.constexpr,  # a tile is of one sample
    WHOLE: tl.constexpr,  # the pitch is a multiple of BLOCK_I
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    OUT: tl.constexpr = y.dtype.element_ty
    first_o = tl.program_id(0) % tiles_o * BLOCK_O
    tile_p = tl.program_id(0) // tiles_o
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o = first_o + tl.arange(0, BLOCK_O)
    j = tl.arange(0, BLOCK_I).to(tl.int64)
    pixels = height * width
    inside = p % pixels
    r, s = inside // width, inside % width
    there = p < total
    left = h + (p.to(tl.int64)[:, None] * pitch + j[None, :])
    right = packed + (o.to(tl.int64)[None, :] * row + j[:, None])
    result = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for k in range(0, (pitch + BLOCK_I - 1) // BLOCK_I * 9):
        tap, first_i = k % 9, k // 9 * BLOCK_I
        dr, ds = tap // 3 - 1, tap % 3 - 1
        valid = there & (r + dr >= 0) & (r + dr < height) & (s + ds >= 0) & (s + ds < width)
        a_mask, b_mask = valid[:, None], (o < outputs)[None, :]
        if not WHOLE:
            a_mask &= (first_i + j < pitch)[None, :]
            b_mask &= (first_i + j < pitch)[:, None]
        a = tl.load(left + ((dr * width + ds).to(tl.int64) * pitch + first_i), mask=a_mask, other=0.0, cache_modifier=".ca")
        b = tl.load(right + (tap * pitch + first_i).to(tl.int64), mask=b_mask, other=0.0)
        result += tl.dot(a, b)  # not as the dot's own accumulator: on sm_90 that has 14 bits

    known = o < outputs
    mask = there[:, None] & known[None, :]
    at = tails + o.to(tl.int64) * (row // 4)
    v = result * (tl.load(at, mask=known, other=0.0) / tl.load(at + 1, mask=known, other=1.0))[None, :]
    if ALONE:
        sample = (tile_p * BLOCK_P // pixels).to(tl.int64)
        bias += sample * bias_n
        residual += sample * r_n
        y += sample * y_n
        if HAS_BIAS:
            v += tl.load(bias + o, mask=known, other=0.0).to(tl.float32)[None, :]
    else:
        sample = (p // pixels).to(tl.int64)[:, None]
        residual += sample * r_n
        y += sample * y_n
        if HAS_BIAS:
            v += tl.load(bias + sample * bias_n + o[None, :], mask=mask, other=0.0).to(tl.float32)
    o, inside = o.to(tl.int64)[None, :], inside.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        v += tl.load(residual + (o * r_c + inside * r_p), mask=mask, other=0.0).to(tl.float32)
    v *= out_scale
    tl.store(y + (o * y_c + inside * y_p), v.to(OUT), mask=mask)
    if CHANNELS > 0:
        chunks = pixels // BLOCK_P
        _moments(v, partial, tile_p // chunks, tile_p % chunks, chunks, first_o, outputs, CHANNELS, BLOCK_P, BLOCK_O)


def tile(pitch: int, outputs: int) -> dict:
    """Tile of the product and its launch options; nothing of the batch in it, so that an image's bits are the same in all.

    The 4096 products that a multiprocessor's tensor cores make in a cycle on sm_90 take 64 bytes of operands with tiles of
    128 x 128, more than L2 is expected to deliver. Left operands, whose rows nine taps share, may come from L1 (`.ca`): that
    leaves some 37. Larger tiles need fewer, but there the tensor cores' own sums have 14 bits, and float32 ones beside them
    take the registers. Three stages, 96 KiB, fit sm_89 too, and leave L1 the rest.
    """
    i = next((i for i in (128, 64, 32) if pitch % i == 0), 64 if pitch > 32 else 32)
    o = min(128, max(16, triton.next_power_of_2(outputs)))
    options = {"num_warps": 8 if o == 128 else 4, "num_stages": 384 // i, "enable_fp_fusion": True}
    return {"BLOCK_P": 128, "BLOCK_O": o, "BLOCK_I": i} | options


def conv3x3(
    x, weight, bias, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu,
    residual, out_scale, stats_groups, packed, algorithm,
):  # fmt: skip
    """(y, stats of y, stats of x); bytes moved: x and residual once, h written and read in one byte, y once."""
    if algorithm != "fp8" or x.numel() == 0:
        return composed(
            x, weight, bias, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu,
            residual, out_scale, stats_groups, packed, algorithm,
        )  # fmt: skip
    _check(x, weight, norm_weight, packed)
    n, inputs, height, width = x.shape
    outputs, pitch, pixels = len(weight), _fp8.padded(inputs), height * width
    tails = _fp8.tails(packed)
    h = x.new_empty((n, height, width, pitch), dtype=torch.float8_e4m3fn)
    if pitch != inputs:
        h.view(torch.uint8)[..., inputs:] = 0  # times weights that are 0
    of_h = h[..., :inputs].permute(0, 3, 1, 2)
    of_x = normalise(of_h, x, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu, tails[0, 1:])
    y, options = image(x, outputs, height, width), tile(pitch, outputs)
    tiles_p, tiles_o = triton.cdiv(n * pixels, options["BLOCK_P"]), triton.cdiv(outputs, options["BLOCK_O"])
    alone = pixels % options["BLOCK_P"] == 0
    channels = outputs // stats_groups if stats_groups else 0
    fused = channels > 0 and alone and options["BLOCK_O"] % channels == 0
    partial = tails.new_empty((n, stats_groups, pixels // options["BLOCK_P"] if fused else 0, 3))
    more = y if residual is None else gn.strided(residual)
    rows = tails if bias is None else bias if bias.stride(-1) == 1 else bias.contiguous()
    bias_n = rows.stride(0) if rows.dim() == 2 else 0
    flags = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "CHANNELS": channels if fused else 0}
    flags |= {"ALONE": alone, "WHOLE": pitch % options["BLOCK_I"] == 0}
    with torch.cuda.device_of(x):
        _multiply[(tiles_p * tiles_o,)](
            h, packed, tails, rows, more, y, partial, out_scale, height, width, n * pixels, outputs, pitch,
            packed.shape[1], bias_n, tiles_o, *planes(more), *planes(y), **flags, **options, **dependent(x),
        )  # fmt: skip
        if fused:
            return y, merged(partial), of_x
        return y, statistics(y, stats_groups) if stats_groups else partial.new_empty((n, 0, 2)), of_x


def _check(x, weight, norm_weight, packed):
    if norm_weight is None or x.dtype == torch.float64:
        raise ValueError(f"algorithm: 'fp8' needs a norm, and x in float32 or less, not {x.dtype}; use direct")
    expected = _fp8.packed_shape(weight)
    if packed is None or packed.dtype != torch.float8_e4m3fn or packed.shape != expected or not packed.is_contiguous():
        raise ValueError(f"packed: expected contiguous E4M3 {expected} of conv3x3_pack(weight, 'fp8'); pack again")

"""group_norm_attention in Triton: statistics, W_qkv times the normalised x, attention with an online softmax, W_out and x.

Products take their operands in x's dtype and sum in float32 (float32 operands: no TF32). Between the
kernels lie q, k, v, [N, pixels, 3 E], and the attention's result, [N, pixels, E].
"""

import torch
import triton
import triton.language as tl

from fastdiff.kernels import group_norm as gn
from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.group_norm import reciprocal_std, store_pair
from fastdiff.kernels.group_norm_silu import _merge, _partial
from fastdiff.kernels.layout import check_float64, planes
from fastdiff.ops.group_norm_attention import reference

LOG2_E = 1.4426950408889634
WIDEST = 256  # channels of a head whose results one program sums


@triton.jit
def _statistics(partial, stats, groups, tiles_g, chunks, BLOCK_G: tl.constexpr, MERGE: tl.constexpr, PDL: tl.constexpr):
    begin(PDL)
    n = (tl.program_id(0) // tiles_g).to(tl.int64)
    first_g = tl.program_id(0) % tiles_g * BLOCK_G
    mean, var = _merge(partial, n, first_g, groups, chunks, BLOCK_G, MERGE)
    store_pair(stats, n, first_g, groups, mean, var, BLOCK_G)


@triton.jit
def _project_in(
    x,  # [N, C, pixels] by strides x_*
    norm_weight,  # [C]
    norm_bias,
    stats,  # float32 [N, groups, 2]
    weight,  # [3 E, C]
    bias,  # [3 E]
    qkv,  # [N, pixels, 3 E]
    eps,
    pixels,
    width,  # C
    features,  # 3 E
    tiles_p,
    tiles_f,
    x_n,
    x_c,
    x_p,
    CHANNELS: tl.constexpr,  # of one group
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    n = (program // tiles_f // tiles_p).to(tl.int64)
    p = program // tiles_f % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    f = program % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F).to(tl.int64)
    rows = weight + f[None, :] * width
    columns = x + n * x_n + p[:, None] * x_p
    groups = width // CHANNELS
    total = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    for first in range(0, width, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        known = c < width
        v = tl.load(columns + c.to(tl.int64)[None, :] * x_c, mask=(p < pixels)[:, None] & known[None, :], other=0.0)
        at = stats + (n * groups + c // CHANNELS) * 2
        mean = tl.load(at, mask=known, other=0.0)
        gain = reciprocal_std(tl.load(at + 1, mask=known, other=1.0), eps)
        gain *= tl.load(norm_weight + c, mask=known, other=0.0).to(tl.float32)
        offset = tl.load(norm_bias + c, mask=known, other=0.0).to(tl.float32)
        h = (v.to(tl.float32) - mean[None, :]) * gain[None, :] + offset[None, :]
        w = tl.load(rows + c[:, None], mask=(f < features)[None, :] & known[:, None], other=0.0)
        total = tl.dot(h.to(w.dtype), w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + f, mask=f < features, other=0.0).to(tl.float32)[None, :]
    to = qkv + (n * pixels + p[:, None]) * features + f[None, :]
    tl.store(to, total.to(qkv.dtype.element_ty), mask=(p < pixels)[:, None] & (f < features)[None, :])


@triton.jit
def _rows(base, at, first, pixels, stride, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """[len(at), WIDTH]: channels first ... of a head at pixels `at`."""
    e = first + tl.arange(0, WIDTH)
    return tl.load(base + at[:, None] * stride + e[None, :], mask=(at < pixels)[:, None] & (e < HEAD)[None, :], other=0.0)


@triton.jit
def _columns(base, at, first, pixels, stride, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH, len(at)]."""
    e = first + tl.arange(0, WIDTH)
    return tl.load(base + at[None, :] * stride + e[:, None], mask=(at < pixels)[None, :] & (e < HEAD)[:, None], other=0.0)


@triton.jit
def _attend(
    qkv,  # [N, pixels, 3 E]
    a,  # [N, pixels, E]
    scale,  # of the scores, times log2(e)
    pixels,
    inner,  # E
    tiles_i,
    HEAD: tl.constexpr,  # d
    PARTS: tl.constexpr,  # programs that share a head's channels of v
    BLOCK_I: tl.constexpr,  # queries
    BLOCK_J: tl.constexpr,  # keys
    BLOCK_D: tl.constexpr,  # channels of q and k at a time
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    heads = inner // HEAD
    i = program % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)
    first_e = program // tiles_i % PARTS * BLOCK_V
    head = program // tiles_i // PARTS % heads
    n = (program // tiles_i // PARTS // heads).to(tl.int64)
    stride = 3 * inner
    q = qkv + n * pixels * stride + head * HEAD
    queries = _rows(q, i, 0, pixels, stride, HEAD, BLOCK_D)
    top = tl.full([BLOCK_I], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    result = tl.zeros([BLOCK_I, BLOCK_V], tl.float32)
    for first in range(0, pixels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J).to(tl.int64)
        s = tl.dot(queries, _columns(q + inner, j, 0, pixels, stride, HEAD, BLOCK_D), input_precision="ieee")
        for d in tl.static_range(BLOCK_D, HEAD, BLOCK_D):
            more = _rows(q, i, d, pixels, stride, HEAD, BLOCK_D)
            s = tl.dot(more, _columns(q + inner, j, d, pixels, stride, HEAD, BLOCK_D), s, input_precision="ieee")
        s = tl.where((j < pixels)[None, :], s * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        weights = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = _rows(q + 2 * inner, j, first_e, pixels, stride, HEAD, BLOCK_V)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
        top = higher
    result = result / total[:, None]
    e = first_e + tl.arange(0, BLOCK_V)
    to = a + (n * pixels + i[:, None]) * inner + head * HEAD + e[None, :]
    tl.store(to, result.to(a.dtype.element_ty), mask=(i < pixels)[:, None] & (e < HEAD)[None, :])


@triton.jit
def _project_out(
    a,  # [N, pixels, E]
    x,  # [N, C, pixels] by strides x_*
    weight,  # [C, E]
    bias,  # [C]
    y,  # [N, C, pixels] by strides y_*
    out_scale,
    pixels,
    width,  # C
    inner,  # E
    tiles_p,
    tiles_f,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    n = (program // tiles_f // tiles_p).to(tl.int64)
    p = program // tiles_f % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)
    f = program % tiles_f * BLOCK_F + tl.arange(0, BLOCK_F).to(tl.int64)
    inside = (p < pixels)[:, None] & (f < width)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    for first in range(0, inner, BLOCK_C):
        e = first + tl.arange(0, BLOCK_C)
        known = e < inner
        at = a + (n * pixels + p[:, None]) * inner + e[None, :]
        rows = tl.load(at, mask=(p < pixels)[:, None] & known[None, :], other=0.0)
        w = tl.load(weight + f[None, :] * inner + e[:, None], mask=(f < width)[None, :] & known[:, None], other=0.0)
        total = tl.dot(rows, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + f, mask=f < width, other=0.0).to(tl.float32)[None, :]
    total += tl.load(x + n * x_n + p[:, None] * x_p + f[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)
    to = y + n * y_n + p[:, None] * y_p + f[None, :] * y_c
    tl.store(to, (total * out_scale).to(y.dtype.element_ty), mask=inside)


def statistics(x, groups):
    """float32 [N, groups, 2] of x [N, C, ...], whose pixels have one stride."""
    shape = gn.shape_of(x, groups, gn.STREAMED)
    tiles = shape.tiles_j * shape.tiles_p
    chunks = shape.chunks(tiles, shape.n * shape.tiles_g)
    partial = x.new_empty((shape.n, groups, chunks, 3), dtype=torch.float32)
    counts = (groups, shape.pixels, shape.tiles_g, shape.tiles_j, tiles, chunks)
    _partial[(shape.n * shape.tiles_g * chunks,)](
        x, x, partial, *counts, *planes(x), HAS_ADD=False, **shape.options(), **dependent(x)
    )
    return merged(partial, shape.block_g)


def merged(partial, block_g=1):
    """float32 [N, groups, 2] of partial [N, groups, chunks, 3], always in the same order."""
    n, groups, chunks, _ = partial.shape
    stats, tiles_g = partial.new_empty((n, groups, 2)), triton.cdiv(groups, block_g)
    merge = triton.next_power_of_2(chunks)
    _statistics[(n * tiles_g,)](
        partial, stats, groups, tiles_g, chunks, BLOCK_G=block_g, MERGE=merge, num_warps=1, enable_fp_fusion=True,
        **dependent(partial),
    )  # fmt: skip
    return stats


def _tiles(pixels: int, features: int, samples: int, summed: int, dtype) -> dict:
    """Tile of a product [pixels, features] and its launch options; narrower where the grid would leave a GPU idle."""
    p = min(64, max(16, triton.next_power_of_2(pixels)))
    f = min(128 if dtype != torch.float32 else 64, max(16, triton.next_power_of_2(features)))
    while f > 32 and samples * triton.cdiv(pixels, p) * triton.cdiv(features, f) < 256:
        f //= 2
    c = min(32 if dtype != torch.float32 else 16, max(16, triton.next_power_of_2(summed)))
    return {"BLOCK_P": p, "BLOCK_F": f, "BLOCK_C": c, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def _head_tiles(pixels: int, d: int, dtype) -> dict:
    """Tile of the attention: a head's results fit a program's registers, its operands the shared memory of every GPU."""
    wide = max(16, triton.next_power_of_2(d))
    few = max(16, triton.next_power_of_2(pixels))
    if dtype == torch.float32:  # no tensor cores: a thread holds its operands' whole rows
        channels, v, rows, keys, warps = min(wide, 32), min(wide, 128), min(32, few), min(32, few), 4
    else:
        channels, v = wide if wide <= WIDEST else 128, min(wide, WIDEST)
        rows, keys, warps = min(64, few), min(64 if v < 128 else 32, few), 4 if v <= 128 else 8
    blocks = {"BLOCK_I": rows, "BLOCK_J": keys, "BLOCK_D": channels, "BLOCK_V": v, "PARTS": triton.cdiv(d, v)}
    return {"HEAD": d, **blocks, "num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


def group_norm_attention(
    x, norm_weight, norm_bias, groups, eps, qkv_weight, qkv_bias, out_weight, out_bias, heads, scale, out_scale, stats
):
    """(y, stats); bytes moved: x read three times, q, k, v and a written and read, y written once."""
    if x.dtype == torch.float64:
        check_float64("group_norm_attention")
    if x.dtype == torch.float64 or x.numel() == 0:
        args = (norm_weight, norm_bias, groups, eps, qkv_weight, qkv_bias, out_weight, out_bias)
        return reference(x, *args, heads, scale, out_scale, stats)
    y = torch.empty_like(x)
    source, result = gn.strided(x), gn.strided(y)
    n, c = x.shape[:2]
    inner, pixels = out_weight.shape[1], x.shape[2:].numel()
    d = inner // heads
    qkv_weight, out_weight = qkv_weight.to(x.dtype).contiguous(), out_weight.to(x.dtype).contiguous()
    qkv, a = x.new_empty((n, pixels, 3 * inner)), x.new_empty((n, pixels, inner))
    with torch.cuda.device_of(x):
        if stats is None:
            stats = statistics(source, groups)
        else:
            stats = stats.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        tiles = _tiles(pixels, 3 * inner, n, c, x.dtype)
        counts = (triton.cdiv(pixels, tiles["BLOCK_P"]), triton.cdiv(3 * inner, tiles["BLOCK_F"]))
        norm = (norm_weight.contiguous(), norm_bias.contiguous(), stats)
        _project_in[(n * counts[0] * counts[1],)](
            source, *norm, qkv_weight, gn.dense(qkv_bias, source), qkv, eps, pixels, c, 3 * inner, *counts, *planes(source),
            CHANNELS=c // groups, HAS_BIAS=qkv_bias is not None, **tiles, **dependent(x),
        )  # fmt: skip
        tiles = _head_tiles(pixels, d, x.dtype)
        tiles_i = triton.cdiv(pixels, tiles["BLOCK_I"])
        grid = (n * heads * tiles["PARTS"] * tiles_i,)
        _attend[grid](qkv, a, scale * LOG2_E, pixels, inner, tiles_i, **tiles, **dependent(x))
        tiles = _tiles(pixels, c, n, inner, x.dtype)
        counts = (triton.cdiv(pixels, tiles["BLOCK_P"]), triton.cdiv(c, tiles["BLOCK_F"]))
        _project_out[(n * counts[0] * counts[1],)](
            a, source, out_weight, gn.dense(out_bias, source), result, out_scale, pixels, c, inner, *counts,
            *planes(source), *planes(result), HAS_BIAS=out_bias is not None, **tiles, **dependent(x),
        )  # fmt: skip
    if result is not y:
        y.copy_(result)
    return y, stats

"""add_noise in Triton: x0 is read once, the noise is made once, and each of the K linear forms is one store."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.layout import check_float64, signed32, tile, walk
from fastdiff.kernels.philox import normals
from fastdiff.ops.add_noise import reference


@triton.jit(do_not_specialize=["draw", "domain"])
def _add_noise(
    x0,  # [B, channels, pixels] by strides x_*
    seeds,  # int64 [B]
    coefficients,  # [B, FORMS, 2]
    out,  # [FORMS, B, channels, pixels], contiguous
    channels,
    pixels,
    tiles_c,
    tiles,  # programs per sample
    x_b,
    x_c,
    x_p,
    out_k,
    draw,
    domain,
    FORMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    c = (program % tiles % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]  # [BLOCK_C, 1]
    first = (program % tiles // tiles_c).to(tl.int64) * BLOCK_Q
    block = c * (pixels // 4) + first + tl.arange(0, BLOCK_Q)[None, :]  # [BLOCK_C, BLOCK_Q]
    p = first * 4 + tl.arange(0, 4 * BLOCK_Q)[None, :]  # [1, 4 BLOCK_Q]
    inside = (c < channels) & (p < pixels)

    x = tl.load(x0 + (sample * x_b + c * x_c + p * x_p), mask=inside).to(tl.float32)
    z = normals(tl.load(seeds + sample), block, draw, domain)  # [BLOCK_C, 4 BLOCK_Q]
    to = out + ((sample * channels + c) * pixels + p)
    for k in tl.static_range(FORMS):
        pair = coefficients + (sample * FORMS + k) * 2
        y = tl.load(pair).to(tl.float32) * x + tl.load(pair + 1).to(tl.float32) * z
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)
        to += out_k


def add_noise(x0, seeds, coefficients, draw, domain):
    """[K, B, ...]; bytes moved: x0 read once, K results written once."""
    if x0.dtype == torch.float64:
        check_float64("add_noise")
        return reference(x0, seeds, coefficients, draw, domain)
    forms = coefficients.shape[1]
    out = x0.new_empty((forms, *x0.shape))
    if out.numel() == 0:
        return out
    if (way := walk([x0])) is None:
        x0 = x0.contiguous()
        way = walk([x0])
    channels, pixels, [(x_b, x_c, x_p)] = way
    block_c, block_q, tiles_c, tiles_p = tile(channels, pixels)
    with torch.cuda.device_of(x0):
        _add_noise[(x0.shape[0] * tiles_c * tiles_p,)](
            x0,
            seeds.contiguous(),
            coefficients.contiguous(),
            out,
            channels,
            pixels,
            tiles_c,
            tiles_c * tiles_p,
            x_b,
            x_c,
            x_p,
            x0.numel(),
            signed32(draw),
            signed32(domain),
            FORMS=forms,
            BLOCK_C=block_c,
            BLOCK_Q=block_q,
            enable_fp_fusion=False,
            **dependent(x0),
        )
    return out

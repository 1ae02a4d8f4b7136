"""embedding in Triton: angles in quarter turns in float64, then Box-Muller's sine and cosine in float32."""

import math

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.layout import check_float64
from fastdiff.kernels.philox import quarter_turns
from fastdiff.ops.embedding import reference

BLOCK = 256  # frequencies, of a sine and a cosine each, per program


@triton.jit
def _embedding(
    t,  # [B]
    freqs,  # [H]
    out,  # [B, 2 H]
    size,  # H
    tiles,  # programs per time
    sin_at,  # column of the first sine, 0 or H
    cos_at,
    TURNS: tl.constexpr,  # quarter turns in a radian, times scale; an ordinary float argument would be float32
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    i = program % tiles * BLOCK + tl.arange(0, BLOCK)
    known = i < size
    u = tl.load(t + b).to(tl.float64) * (tl.load(freqs + i, mask=known, other=0.0).to(tl.float64) * TURNS)
    whole = tl.floor(u + 0.5)
    # Past 2^62 there is no remainder and no integer to speak of; infinity and NaN still come out as NaN.
    c, s = quarter_turns((u - whole).to(tl.float32), tl.where(tl.abs(u) < 2.0**62, whole, 0.0).to(tl.int64).to(tl.uint32))
    row = out + b * 2 * size + i
    tl.store(row + sin_at, s.to(out.dtype.element_ty), mask=known)
    tl.store(row + cos_at, c.to(out.dtype.element_ty), mask=known)


def embedding(t, freqs, scale, sin_first, dtype):
    """[B, 2 H]; bytes moved: the result, written once."""
    if torch.float64 in (t.dtype, freqs.dtype, dtype):
        check_float64("embedding")
        return reference(t, freqs, scale, sin_first, dtype)
    size = freqs.shape[0]
    out = t.new_empty((t.shape[0], 2 * size), dtype=dtype)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(size, BLOCK)
    with torch.cuda.device_of(t):
        _embedding[(t.shape[0] * tiles,)](
            t.contiguous(), freqs.contiguous(), out, size, tiles,
            0 if sin_first else size, size if sin_first else 0, scale * 2 / math.pi, BLOCK,
            num_warps=1, enable_fp_fusion=False, **dependent(t),
        )  # fmt: skip
    return out

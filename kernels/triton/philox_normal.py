"""philox_normal in Triton: a store-only kernel; each lane makes one Philox block and keeps its four normals together."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.layout import check_float64, signed32
from fastdiff.kernels.philox import normals
from fastdiff.ops.philox_normal import reference

BLOCKS = 256  # Philox blocks, of four elements each, per program


@triton.jit(do_not_specialize=["draw", "domain"])
def _philox_normal(
    out,  # [B, D]
    seeds,  # int64 [B]
    size,  # D
    tiles,  # programs per sample
    draw,
    domain,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * BLOCKS
    seed = tl.load(seeds + sample)
    block = first + tl.arange(0, BLOCKS)[None, :]  # [1, BLOCKS]
    z = normals(seed, block, draw, domain)  # [1, 4 BLOCKS]
    element = first * 4 + tl.arange(0, 4 * BLOCKS)[None, :]
    tl.store(out + sample * size + element, z.to(out.dtype.element_ty), mask=element < size)


def philox_normal(seeds, draw, domain, shape, dtype):
    """Noise [B, *shape]; bytes moved: the result, written once."""
    if dtype == torch.float64:
        check_float64("philox_normal")
        return reference(seeds, draw, domain, shape, dtype)
    out = torch.empty((seeds.shape[0], *shape), dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    size = out[0].numel()
    tiles = triton.cdiv(size, 4 * BLOCKS)
    with torch.cuda.device_of(out):
        _philox_normal[(seeds.shape[0] * tiles,)](
            out, seeds.contiguous(), size, tiles, signed32(draw), signed32(domain), BLOCKS, enable_fp_fusion=False,
            **dependent(out),
        )  # fmt: skip
    return out

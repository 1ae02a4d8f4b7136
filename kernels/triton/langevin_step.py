"""langevin_step in Triton: partial sums of squares, then the step, which folds them; both make the noise, none stores it."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.layout import check_float64, tile, walk
from fastdiff.kernels.philox import normals
from fastdiff.ops.langevin_step import L, Norms, reference
from fastdiff.ops.philox_normal import Domain

COLUMNS = tl.constexpr(len(L))
SCORE_X, SCORE_F, STEP_SIZE, NEXT_IN = (tl.constexpr(int(v)) for v in (L.SCORE_X, L.SCORE_F, L.STEP, L.NEXT_IN))
SAMPLE, BATCH = tl.constexpr(int(Norms.SAMPLE)), tl.constexpr(int(Norms.BATCH))
STEP = tl.constexpr(int(Domain.STEP))
PARTS = 64  # most partial sums of a sample: as many as the second kernel folds in one load


@triton.jit
def _tile_of(
    x, F, seeds, coefficients, draws, row, row_b, channels, pixels, tiles_c, sample, index,
    x_b, x_c, x_p, f_b, f_c, f_p, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Tile `index` of a sample: channels, pixels, which of them exist, x, the score, z and the row's coefficients."""
    c = (index % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]  # [BLOCK_C, 1]
    first = (index // tiles_c).to(tl.int64) * BLOCK_Q
    block = c * (pixels // 4) + first + tl.arange(0, BLOCK_Q)[None, :]  # [BLOCK_C, BLOCK_Q]
    p = first * 4 + tl.arange(0, 4 * BLOCK_Q)[None, :]  # [1, 4 BLOCK_Q]
    inside = (c < channels) & (p < pixels)
    r = tl.load(row + sample * row_b)
    coefficient = coefficients + r * COLUMNS
    now = tl.load(x + (sample * x_b + c * x_c + p * x_p), mask=inside, other=0.0)
    f = tl.load(F + (sample * f_b + c * f_c + p * f_p), mask=inside, other=0.0).to(tl.float32)
    score = tl.load(coefficient + SCORE_X) * now + tl.load(coefficient + SCORE_F) * f
    z = normals(tl.load(seeds + sample), block, tl.load(draws + r), tl.full([], STEP, tl.int32))
    return c, p, inside, now, tl.where(inside, score, 0.0), tl.where(inside, z, 0.0), coefficient


@triton.jit
def _sums(
    x,  # float32 [B, channels, pixels] by strides x_*
    F,  # [B, channels, pixels] by strides f_*
    seeds,  # int64 [B]
    coefficients,  # float32 [rows, COLUMNS]
    draws,  # int32 [rows]
    row,  # int64 [1] or [B]
    row_b,  # 0 or 1
    parts,  # float32 [B, chunks, 2]
    channels,
    pixels,
    tiles_c,
    tiles,  # of a sample
    per,  # tiles per program
    chunks,  # programs per sample
    x_b,
    x_c,
    x_p,
    f_b,
    f_c,
    f_p,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    start = program % chunks * per
    of_z = tl.zeros([BLOCK_C, 4 * BLOCK_Q], tl.float32)
    of_score = tl.zeros([BLOCK_C, 4 * BLOCK_Q], tl.float32)
    for index in range(start, tl.minimum(start + per, tiles)):
        _, _, _, _, score, z, _ = _tile_of(
            x, F, seeds, coefficients, draws, row, row_b, channels, pixels, tiles_c, sample, index,
            x_b, x_c, x_p, f_b, f_c, f_p, BLOCK_C, BLOCK_Q,
        )  # fmt: skip
        of_z += z * z
        of_score += score * score
    to = parts + program.to(tl.int64) * 2
    tl.store(to, tl.sum(tl.sum(of_z, axis=1), axis=0))
    tl.store(to + 1, tl.sum(tl.sum(of_score, axis=1), axis=0))


@triton.jit
def _squares(parts, b, batch, chunks, PARTS: tl.constexpr):
    """||z||^2 and ||score||^2 of the samples b [BLOCK]."""
    k = tl.arange(0, PARTS)[None, :]
    at = parts + (b[:, None] * chunks + k) * 2
    known = (b[:, None] < batch) & (k < chunks)
    return tl.sum(tl.load(at, mask=known, other=0.0), axis=1), tl.sum(tl.load(at + 1, mask=known, other=0.0), axis=1)


@triton.jit
def _mean_ratio(parts, ratio, batch, chunks, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):
    """(mean ||z|| / mean ||score||)^2 over the batch, in one program."""
    begin(PDL)
    of_z = tl.zeros([BLOCK], tl.float32)
    of_score = tl.zeros([BLOCK], tl.float32)
    for first in range(0, batch, BLOCK):
        z, score = _squares(parts, first + tl.arange(0, BLOCK).to(tl.int64), batch, chunks, PARTS)
        of_z += tl.sqrt_rn(z)
        of_score += tl.sqrt_rn(score)
    z, score = tl.sum(of_z, axis=0), tl.sum(of_score, axis=0)
    q = tl.where(score == 0.0, 0.0, tl.div_rn(z, tl.where(score == 0.0, 1.0, score)))
    tl.store(ratio, q * q)


@triton.jit
def _step(
    x,
    F,
    net_in,  # [B, channels, pixels] by strides in_*
    mean,  # as x
    seeds,
    coefficients,
    draws,
    row,
    row_b,
    parts,
    ratio,  # float32 [1]
    channels,
    pixels,
    tiles_c,
    tiles,
    batch,
    chunks,
    x_b,
    x_c,
    x_p,
    f_b,
    f_c,
    f_p,
    in_b,
    in_c,
    in_p,
    NORMS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    c, p, inside, now, score, z, coefficient = _tile_of(
        x, F, seeds, coefficients, draws, row, row_b, channels, pixels, tiles_c, sample, program % tiles,
        x_b, x_c, x_p, f_b, f_c, f_p, BLOCK_C, BLOCK_Q,
    )  # fmt: skip
    eps = tl.load(coefficient + STEP_SIZE)
    if NORMS == SAMPLE:
        of_z, of_score = _squares(parts, sample + tl.zeros([1], tl.int64), batch, chunks, PARTS)
        none = of_score == 0.0
        q = tl.where(none, 0.0, tl.div_rn(of_z, tl.where(none, 1.0, of_score)))
        eps *= tl.sum(q, axis=0)
    elif NORMS == BATCH:
        eps *= tl.load(ratio)
    new = now + eps * score
    at = sample * x_b + c * x_c + p * x_p
    if HAS_MEAN:
        tl.store(mean + at, new, mask=inside)
    new += tl.sqrt_rn(2.0 * eps) * z
    tl.store(x + at, new, mask=inside)
    y = tl.load(coefficient + NEXT_IN) * new
    tl.store(net_in + (sample * in_b + c * in_c + p * in_p), y.to(net_in.dtype.element_ty), mask=inside)


def langevin_step(x, F, net_in, mean, seeds, coefficients, draws, row, norms):
    """One step in place; bytes moved: x read twice and written, F read twice, net_in and mean written."""
    if x.dtype == torch.float64:
        check_float64("langevin_step")
        return reference(x, F, net_in, mean, seeds, coefficients, draws, row, norms)
    if x.numel() == 0:
        return None
    kept = x if mean is None else mean
    way = walk([x, F, net_in, kept])
    if way is None or way[2][3] != way[2][0]:
        return _on_copies(x, F, net_in, mean, seeds, coefficients, draws, row, norms)
    channels, pixels, strides = way
    block_c, block_q, tiles_c, tiles_p = tile(channels, pixels)
    batch, tiles = x.shape[0], tiles_c * tiles_p
    per = triton.cdiv(tiles, PARTS)
    chunks = triton.cdiv(tiles, per)
    parts, ratio = x.new_empty((batch, chunks, 2)), x.new_empty(1)
    tables = [t.contiguous() for t in (seeds, coefficients, draws, row)]
    row_b = 0 if row.shape[0] == 1 else 1
    blocks = {"BLOCK_C": block_c, "BLOCK_Q": block_q, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        if norms != Norms.GIVEN:
            _sums[(batch * chunks,)](
                x,
                F,
                *tables,
                row_b,
                parts,
                channels,
                pixels,
                tiles_c,
                tiles,
                per,
                chunks,
                *strides[0],
                *strides[1],
                **blocks,
                **dependent(x),
            )
        if norms == Norms.BATCH:
            _mean_ratio[(1,)](parts, ratio, batch, chunks, BLOCK=32, PARTS=PARTS, enable_fp_fusion=False, **dependent(x))
        _step[(batch * tiles,)](
            x, F, net_in, kept, *tables, row_b, parts, ratio, channels, pixels, tiles_c, tiles, batch, chunks,
            *strides[0], *strides[1], *strides[2], NORMS=int(norms), HAS_MEAN=mean is not None, PARTS=PARTS, **blocks,
            **dependent(x),
        )  # fmt: skip
    return None


def _on_copies(x, F, net_in, mean, *rest):
    """The same step on contiguous copies, for layouts in which no single walk serves all tensors."""
    mutable = [t for t in (x, net_in, mean) if t is not None]
    fresh = [t.contiguous() for t in mutable]
    langevin_step(fresh[0], F.contiguous(), fresh[1], None if mean is None else fresh[2], *rest)
    for t, new in zip(mutable, fresh, strict=True):
        if new is not t:
            t.copy_(new)

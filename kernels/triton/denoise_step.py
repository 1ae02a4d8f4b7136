"""denoise_step in Triton: a plan's row in one pass, with its coefficients, draws and slots read on the device."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.layout import check_float64, tile, walk
from fastdiff.kernels.philox import normals
from fastdiff.ops.denoise_step import HISTORY, C, K, reference
from fastdiff.ops.philox_normal import Domain

COLUMNS = tl.constexpr(len(C))
SKIP, OUT, X, SAVED = (tl.constexpr(int(column)) for column in (C.SKIP, C.OUT, C.X, C.SAVED))
D, D_CLIP, H0, NEXT_IN = (tl.constexpr(int(column)) for column in (C.D, C.D_CLIP, C.H0, C.NEXT_IN))
N1, N2 = tl.constexpr(int(C.N1)), tl.constexpr(int(C.N2))
CODES = tl.constexpr(len(K))
DRAW1, DRAW2 = tl.constexpr(int(K.DRAW1)), tl.constexpr(int(K.DRAW2))
SAVE_X, SAVE_D, SAVE_CLIPPED = (tl.constexpr(int(code)) for code in (K.SAVE_X, K.SAVE_D, K.SAVE_CLIPPED))
STEP = tl.constexpr(int(Domain.STEP))


@triton.jit
def _denoise_step(
    x,  # float32 [B, channels, pixels] by strides x_*; saved [...] and history [S, ...] lie alike
    F,  # [B, channels, pixels] by strides f_*
    saved,
    history,
    net_in,  # [B, channels, pixels] by strides in_*
    seeds,  # int64 [B]
    coefficients,  # float32 [rows, COLUMNS]
    codes,  # int32 [rows, CODES]
    row,  # int64 [1] or [B]
    row_b,  # 0 or 1
    channels,
    pixels,
    tiles_c,
    tiles,  # programs per sample
    x_b,
    x_c,
    x_p,
    f_b,
    f_c,
    f_p,
    in_b,
    in_c,
    in_p,
    history_s,
    HAS_F: tl.constexpr,
    HAS_SAVED: tl.constexpr,
    SLOTS: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    c = (program % tiles % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]  # [BLOCK_C, 1]
    first = (program % tiles // tiles_c).to(tl.int64) * BLOCK_Q
    block = c * (pixels // 4) + first + tl.arange(0, BLOCK_Q)[None, :]  # [BLOCK_C, BLOCK_Q]
    p = first * 4 + tl.arange(0, 4 * BLOCK_Q)[None, :]  # [1, 4 BLOCK_Q]
    inside = (c < channels) & (p < pixels)

    r = tl.load(row + sample * row_b)
    coefficient = coefficients + r * COLUMNS
    code = codes + r * CODES
    at = sample * x_b + c * x_c + p * x_p
    now = tl.load(x + at, mask=inside)
    new = tl.load(coefficient + X) * now
    if HAS_F:
        f = tl.load(F + (sample * f_b + c * f_c + p * f_p), mask=inside).to(tl.float32)
        d = tl.load(coefficient + SKIP) * now + tl.load(coefficient + OUT) * f
        clipped = tl.clamp(d, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        new += tl.load(coefficient + D) * d + tl.load(coefficient + D_CLIP) * clipped

    # A term whose coefficient is 0 is not read: its buffer may never have been written.
    if HAS_SAVED:
        a = tl.load(coefficient + SAVED)
        if a != 0.0:
            new += a * tl.load(saved + at, mask=inside)
    past = history + at
    for j in tl.static_range(READ):
        h = tl.load(coefficient + H0 + j)
        if h != 0.0:
            new += h * tl.load(past, mask=inside)
        past += history_s
    seed = tl.load(seeds + sample)
    n1 = tl.load(coefficient + N1)
    if n1 != 0.0:
        new += n1 * normals(seed, block, tl.load(code + DRAW1), tl.full([], STEP, tl.int32))
    n2 = tl.load(coefficient + N2)
    if n2 != 0.0:
        new += n2 * normals(seed, block, tl.load(code + DRAW2), tl.full([], STEP, tl.int32))

    if HAS_SAVED:  # noqa: SIM102 (decided at compile time; the next at run time)
        if tl.load(code + SAVE_X) == 1:
            tl.store(saved + at, now, mask=inside)
    if HAS_F and SLOTS > 0:
        slot = tl.load(code + SAVE_D)
        if (slot >= 0) & (slot < SLOTS):
            kept = tl.where(tl.load(code + SAVE_CLIPPED) == 1, clipped, d)
            tl.store(history + (at + slot.to(tl.int64) * history_s), kept, mask=inside)
    tl.store(x + at, new, mask=inside)
    y = tl.load(coefficient + NEXT_IN) * new
    tl.store(net_in + (sample * in_b + c * in_c + p * in_p), y.to(net_in.dtype.element_ty), mask=inside)


def denoise_step(x, F, saved, history, net_in, seeds, coefficients, codes, row):
    """One row in place; bytes moved: x read and written, F read, net_in written, saved and history where they are used."""
    if x.dtype == torch.float64:
        check_float64("denoise_step")
        return reference(x, F, saved, history, net_in, seeds, coefficients, codes, row)
    if x.numel() == 0:
        return None
    state = [x, *([saved] if saved.numel() else []), *history.unbind(0)]
    way = walk([*state, net_in, *([] if F is None else [F])])
    if way is None or any(strides != way[2][0] for strides in way[2][: len(state)]):
        return _on_copies(x, F, saved, history, net_in, seeds, coefficients, codes, row)
    channels, pixels, strides = way
    block_c, block_q, tiles_c, tiles_p = tile(channels, pixels)
    with torch.cuda.device_of(x):
        _denoise_step[(x.shape[0] * tiles_c * tiles_p,)](
            x, x if F is None else F, saved if saved.numel() else x, history if history.numel() else x, net_in,
            *(t.contiguous() for t in (seeds, coefficients, codes, row)),
            0 if row.shape[0] == 1 else 1, channels, pixels, tiles_c, tiles_c * tiles_p,
            *strides[0], *strides[-1], *strides[len(state)], history.stride(0),
            HAS_F=F is not None, HAS_SAVED=saved.numel() > 0,
            SLOTS=history.shape[0], READ=min(history.shape[0], HISTORY),
            BLOCK_C=block_c, BLOCK_Q=block_q, enable_fp_fusion=False,
        )  # fmt: skip
    return None


def _on_copies(x, F, saved, history, net_in, *rest):
    """The same row on contiguous copies, for layouts in which no single walk serves all tensors."""
    mutable = (x, saved, history, net_in)
    fresh = [t.contiguous() for t in mutable]
    denoise_step(fresh[0], None if F is None else F.contiguous(), *fresh[1:], *rest)
    for t, new in zip(mutable, fresh, strict=True):
        if new is not t:
            t.copy_(new)

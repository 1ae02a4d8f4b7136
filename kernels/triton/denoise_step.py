"""denoise_step in Triton: a plan's row in one pass, with its coefficients, draws and slots read on the device."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.kernels.layout import check_float64, tile, walk
from fastdiff.kernels.philox import normals
from fastdiff.ops.denoise_step import HISTORY, C, K, reference
from fastdiff.ops.philox_normal import Domain

COLUMNS = tl.constexpr(len(C))
SKIP, OUT, X, SAVED = (tl.constexpr(int(column)) for column in (C.SKIP, C.OUT, C.X, C.SAVED))
D, D_CLIP, H0, NEXT_IN = (tl.constexpr(int(column)) for column in (C.D, C.D_CLIP, C.H0, C.NEXT_IN))
N1, N2, N_V = (tl.constexpr(int(column)) for column in (C.N1, C.N2, C.N_V))
GUIDE, LOG_MIN, LOG_MAX = (tl.constexpr(int(column)) for column in (C.GUIDE, C.LOG_MIN, C.LOG_MAX))
CODES = tl.constexpr(len(K))
DRAW1, DRAW2 = tl.constexpr(int(K.DRAW1)), tl.constexpr(int(K.DRAW2))
SAVE_X, SAVE_D, SAVE_CLIPPED = (tl.constexpr(int(code)) for code in (K.SAVE_X, K.SAVE_D, K.SAVE_CLIPPED))
STEP = tl.constexpr(int(Domain.STEP))


@triton.jit
def exponential(x):
    """e^x in multiplies and adds that each round by themselves: a power of two, and Cephes' expf on the rest."""
    x = tl.clamp(x, -87.0, 88.0, propagate_nan=tl.PropagateNan.ALL)
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to the nearest integer
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * (r * r) + r + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _denoise_step(
    x,  # float32 [B, channels, pixels] by strides x_*; saved [...] and history [S, ...] lie alike
    F,  # [B, channels, pixels] by strides f_*; F_u and V lie alike
    F_u,
    V,
    saved,
    history,
    net_in,  # [COPIES B, channels, pixels] by strides in_*
    seeds,  # int64 [B]
    coefficients,  # float32 [rows, COLUMNS]
    codes,  # int32 [rows, CODES]
    row,  # int64 [1] or [B]
    guidance,  # float32 [1] or [B]
    row_b,  # 0 or 1
    guidance_b,
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
    net_in_s,
    HAS_F: tl.constexpr,
    HAS_F_U: tl.constexpr,
    HAS_V: tl.constexpr,
    COPIES: tl.constexpr,
    HAS_SAVED: tl.constexpr,
    SLOTS: tl.constexpr,
    READ: tl.constexpr,
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

    r = tl.load(row + sample * row_b)
    coefficient = coefficients + r * COLUMNS
    code = codes + r * CODES
    at = sample * x_b + c * x_c + p * x_p
    now = tl.load(x + at, mask=inside)
    new = tl.load(coefficient + X) * now
    branch = sample * f_b + c * f_c + p * f_p
    if HAS_F:
        f = tl.load(F + branch, mask=inside).to(tl.float32)
        if HAS_F_U:
            g = tl.load(coefficient + GUIDE) * (tl.load(guidance + sample * guidance_b) - 1.0)
            if g != 0.0:
                f += g * (f - tl.load(F_u + branch, mask=inside).to(tl.float32))
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
    if HAS_V:
        n_v = tl.load(coefficient + N_V)
        if (n1 != 0.0) | (n_v != 0.0):
            deviation = tl.zeros_like(now) + n1
            if n_v != 0.0:
                low, high = tl.load(coefficient + LOG_MIN), tl.load(coefficient + LOG_MAX)
                v = tl.load(V + branch, mask=inside).to(tl.float32)
                deviation += n_v * exponential(v * ((high - low) * 0.25) + (high + low) * 0.25)
            new += deviation * normals(seed, block, tl.load(code + DRAW1), tl.full([], STEP, tl.int32))
    else:
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
    y = (tl.load(coefficient + NEXT_IN) * new).to(net_in.dtype.element_ty)
    to = net_in + (sample * in_b + c * in_c + p * in_p)
    for _ in tl.static_range(COPIES):
        tl.store(to, y, mask=inside)
        to += net_in_s


def denoise_step(x, F, saved, history, net_in, seeds, coefficients, codes, row, F_u=None, guidance=None, V=None):
    """One row in place; bytes moved: x read and written, F read, net_in written, all else where it is used."""
    rest = (seeds, coefficients, codes, row)
    if x.dtype == torch.float64:
        check_float64("denoise_step")
        return reference(x, F, saved, history, net_in, *rest, F_u, guidance, V)
    if x.numel() == 0:
        return None
    batch = x.shape[0]
    state = [x, *([saved] if saved.numel() else []), *history.unbind(0)]
    branches = [t for t in (F, F_u, V) if t is not None]
    way = walk([*state, net_in[:batch], *branches])
    if way is None or not _alike(way[2][: len(state)]) or not _alike(way[2][len(state) + 1 :]):
        return _on_copies(x, F, saved, history, net_in, rest, F_u, guidance, V)
    channels, pixels, strides = way
    block_c, block_q, tiles_c, tiles_p = tile(channels, pixels)
    table = [t.contiguous() for t in (*rest, coefficients if guidance is None else guidance)]
    each = [int(t.shape[0] != 1) for t in (row, table[-1])]
    with torch.cuda.device_of(x):
        _denoise_step[(batch * tiles_c * tiles_p,)](
            x, *(x if t is None else t for t in (F, F_u, V)), saved if saved.numel() else x,
            history if history.numel() else x, net_in, *table, *each, channels, pixels, tiles_c, tiles_c * tiles_p,
            *strides[0], *strides[-1], *strides[len(state)], history.stride(0), batch * net_in.stride(0),
            HAS_F=F is not None, HAS_F_U=F_u is not None, HAS_V=V is not None, COPIES=net_in.shape[0] // batch,
            HAS_SAVED=saved.numel() > 0, SLOTS=history.shape[0], READ=min(history.shape[0], HISTORY),
            BLOCK_C=block_c, BLOCK_Q=block_q, enable_fp_fusion=False, **dependent(x),
        )  # fmt: skip
    return None


def _alike(strides):
    return all(s == strides[0] for s in strides)


def _on_copies(x, F, saved, history, net_in, rest, F_u, guidance, V):
    """The same row on contiguous copies, for layouts in which no single walk serves all tensors."""
    mutable = (x, saved, history, net_in)
    fresh = [t.contiguous() for t in mutable]
    F, F_u, V = (None if t is None else t.contiguous() for t in (F, F_u, V))
    denoise_step(fresh[0], F, *fresh[1:], *rest, F_u, guidance, V)
    for t, new in zip(mutable, fresh, strict=True):
        if new is not t:
            t.copy_(new)

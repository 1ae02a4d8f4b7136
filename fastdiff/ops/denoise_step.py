"""denoise_step: one row of a plan, the whole sampler update in one pass over memory.

With the row's coefficients (a table on the device, see `C` and `K` below), x the image the network saw and F its output:

    D  = c_skip x + c_out F                                 estimate of x0 (rows without evaluation have no F)
    Dc = clamp(D, -1, 1)
    x' = a_x x + a_s saved + a_D D + a_Dc Dc + sum_j a_hj history[j] + n_1 z(draw_1) + n_2 z(draw_2)

then, in place, saved <- x and history[slot] <- D or Dc where the row says so, x <- x', net_in <- c_in x'.
"""

import enum

import torch

from fastdiff.ops import _register
from fastdiff.ops.philox_normal import MASK, Domain, normal_float32

HISTORY = 4  # most slots that one row can read


class C(enum.IntEnum):
    """Columns of the coefficient table, float [rows, len(C)]."""

    SKIP = 0  # c_skip
    OUT = 1  # c_out
    X = 2  # a_x
    SAVED = 3  # a_s
    D = 4  # a_D
    D_CLIP = 5  # a_Dc
    H0 = 6  # a_h0 ... a_h3
    H1 = 7
    H2 = 8
    H3 = 9
    N1 = 10  # n_1
    N2 = 11  # n_2
    NEXT_IN = 12  # c_in of the next evaluation
    NOISE = 13  # c_noise of this row's evaluation; read by the loop, not by the op


class K(enum.IntEnum):
    """Columns of the code table, int32 [rows, len(K)]."""

    DRAW1 = 0  # counter word of z(draw_1)
    DRAW2 = 1
    SAVE_X = 2  # 1: saved <- x
    SAVE_D = 3  # slot of history that receives D, or -1
    SAVE_CLIPPED = 4  # 1: it receives Dc


def _sample_rows(table, row, x):
    """Columns of the row(s) as [B or 1, 1, 1, ...] tensors."""
    picked = table[row].to(x.dtype) if table.is_floating_point() else table[row]
    return [c.reshape(-1, *[1] * (x.dim() - 1)) for c in picked.unbind(-1)]


def reference(x, F, saved, history, net_in, seeds, coefficients, codes, row):
    c, k = _sample_rows(coefficients, row, x), codes[row]
    out = c[C.X] * x

    def times(column, t):
        # 0 times an unwritten buffer is 0, whatever is in the buffer
        return torch.where(c[column] != 0, c[column] * t, 0)

    if F is not None:
        d = c[C.SKIP] * x + c[C.OUT] * F.to(x.dtype)
        dc = d.clamp(-1, 1)
        out = out + c[C.D] * d + c[C.D_CLIP] * dc
    if saved.numel():
        out = out + times(C.SAVED, saved)
    for j in range(min(history.shape[0], HISTORY)):
        out = out + times(C.H0 + j, history[j])
    for amount, column in ((c[C.N1], K.DRAW1), (c[C.N2], K.DRAW2)):
        if amount.any():
            out = out + amount * _draws(seeds, k[:, column], x)
    if saved.numel():
        saved.copy_(torch.where(_flag(k[:, K.SAVE_X] == 1, x), x, saved))
    if F is not None:
        kept = torch.where(_flag(k[:, K.SAVE_CLIPPED] == 1, x), dc, d)
        for j in range(history.shape[0]):
            history[j].copy_(torch.where(_flag(k[:, K.SAVE_D] == j, x), kept, history[j]))
    x.copy_(out)
    net_in.copy_(c[C.NEXT_IN] * out)


def _flag(condition, x):
    return condition.reshape(-1, *[1] * (x.dim() - 1))


def _draws(seeds, draws, x):
    # Draws are 32-bit words, kept as int32 bit patterns.
    if draws.shape[0] == 1:
        return normal_float32(seeds, int(draws[0]) & MASK, Domain.STEP, x.shape[1:]).to(x.dtype)
    each = [normal_float32(s.reshape(1), int(d) & MASK, Domain.STEP, x.shape[1:]) for s, d in zip(seeds, draws, strict=True)]
    return torch.cat(each).to(x.dtype) if each else torch.empty_like(x)


def _fake(x, F, saved, history, net_in, seeds, coefficients, codes, row):
    return None


_register.define(
    "denoise_step",
    "(Tensor(a!) x, Tensor? F, Tensor(b!) saved, Tensor(c!) history, Tensor(d!) net_in, Tensor seeds,"
    " Tensor coefficients, Tensor codes, Tensor row) -> ()",
    reference,
    _fake,
)


def denoise_step(
    x: torch.Tensor,  # float32 (or float64) [B, C, H, W], updated in place
    F: torch.Tensor | None,  # [B, C, H, W], the network's dtype; None: a row without evaluation
    saved: torch.Tensor,  # like x, or empty [0]
    history: torch.Tensor,  # [S, B, C, H, W] like x, S may be 0
    net_in: torch.Tensor,  # [B, C, H, W], the network's dtype and memory format
    seeds: torch.Tensor,  # int64 [B]
    coefficients: torch.Tensor,  # [rows, len(C)], x's dtype
    codes: torch.Tensor,  # int32 [rows, len(K)]
    row: torch.Tensor,  # int64 [1], or [B]: a row per sample
) -> None:
    """Carry out one row of a plan in place; the module's docstring gives the formula.

    Noise is z(draw) = philox_normal(seeds, draw, domain=Domain.STEP), made in the kernel. Rows with n_1 = 0 or n_2 = 0
    make none. `row` is read on the device, so one captured graph serves every row. Not differentiable.

    Raises: TypeError, ValueError naming the argument, its value and what is wanted.

    Bytes moved: x read and written, F read, net_in written; saved and history only where their coefficient is not 0.
    """
    _check(x, F, saved, history, net_in, seeds, coefficients, codes, row)
    torch.ops.fastdiff.denoise_step(x, F, saved, history, net_in, seeds, coefficients, codes, row)


def _check(x, F, saved, history, net_in, seeds, coefficients, codes, row):
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: the sampler's state is float32 or float64, got {x.dtype}; convert it, F may stay {x.dtype}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, F, saved, history, net_in)):
        raise RuntimeError("denoise_step has no derivative; call it under torch.inference_mode() or torch.no_grad()")
    for name, tensor in (("F", F), ("net_in", net_in), ("saved", saved if saved.numel() else None)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} differs from x, {tuple(x.shape)}")
    if history.dim() != x.dim() + 1 or history.shape[1:] != x.shape:
        raise ValueError(f"history: expected [slots, *{tuple(x.shape)}], got {tuple(history.shape)}")
    if saved.dtype != x.dtype or history.dtype != x.dtype or coefficients.dtype != x.dtype:
        raise TypeError(
            f"saved, history and coefficients must have x's dtype {x.dtype}, "
            f"got {saved.dtype}, {history.dtype} and {coefficients.dtype}"
        )
    if seeds.dtype != torch.int64 or seeds.shape != x.shape[:1]:
        raise TypeError(f"seeds: expected int64 [{x.shape[0]}], got {seeds.dtype} of shape {tuple(seeds.shape)}")
    if coefficients.dim() != 2 or coefficients.shape[1] != len(C):
        raise ValueError(f"coefficients: expected [rows, {len(C)}], got {tuple(coefficients.shape)}")
    if codes.dtype != torch.int32 or codes.shape != (coefficients.shape[0], len(K)):
        raise ValueError(
            f"codes: expected int32 [{coefficients.shape[0]}, {len(K)}], got {codes.dtype} {tuple(codes.shape)}"
        )
    if row.dtype != torch.int64 or row.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"row: expected int64 [1] or [{x.shape[0]}], got {row.dtype} {tuple(row.shape)}")
    devices = {t.device for t in (x, F, saved, history, net_in, seeds, coefficients, codes, row) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}; move them to x's")

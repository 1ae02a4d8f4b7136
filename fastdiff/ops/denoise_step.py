"""denoise_step: one row of a plan, the whole sampler update in one pass over memory.

With the row's coefficients (a table on the device, see `C` and `K` below), x the image the network saw and F its output,
F_u the output of an unconditional (or weaker) network, w the guidance weight and V a learned variance:

    G  = F + g (w - 1) (F - F_u)                            = F_u + w (F - F_u) where g = 1, F where g = 0
    D  = c_skip x + c_out G                                 estimate of x0 (rows without evaluation have no F)
    Dc = clamp(D, -1, 1)
    s  = n_1 + n_v exp((v log_max + (1 - v) log_min) / 2)   v = (V + 1) / 2; Nichol and Dhariwal 2021, equation 15
    x' = a_x x + a_s saved + a_D D + a_Dc Dc + sum_j a_hj history[j] + s z(draw_1) + n_2 z(draw_2)

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
    GUIDE = 14  # g: 1 where guidance applies, 0 outside its interval; in between, a row's share of w - 1
    N_V = 15  # n_v, the amount of the learned deviation
    LOG_MIN = 16  # the logarithms of the variances that V = -1 and V = 1 stand for
    LOG_MAX = 17


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


def reference(x, F, saved, history, net_in, seeds, coefficients, codes, row, F_u=None, guidance=None, V=None):
    c, k = _sample_rows(coefficients, row, x), codes[row]
    out = c[C.X] * x
    if F is not None:
        d = c[C.SKIP] * x + c[C.OUT] * _guided(c, x, F, F_u, guidance)
        dc = d.clamp(-1, 1)
        out = out + c[C.D] * d + c[C.D_CLIP] * dc
    if saved.numel():
        out = out + _times(c[C.SAVED], saved)
    for j in range(min(history.shape[0], HISTORY)):
        out = out + _times(c[C.H0 + j], history[j])
    for amount, column in ((_deviation(c, x, V), K.DRAW1), (c[C.N2], K.DRAW2)):
        if amount.any():
            out = out + amount * _draws(seeds, k[:, column], x)
    if saved.numel():
        saved.copy_(torch.where(_flag(k[:, K.SAVE_X] == 1, x), x, saved))
    if F is not None:
        kept = torch.where(_flag(k[:, K.SAVE_CLIPPED] == 1, x), dc, d)
        for j in range(history.shape[0]):
            history[j].copy_(torch.where(_flag(k[:, K.SAVE_D] == j, x), kept, history[j]))
    x.copy_(out)
    for part in net_in.split(max(x.shape[0], 1)):
        part.copy_(c[C.NEXT_IN] * out)


def _times(amount, t):
    """amount t; 0 times an unwritten buffer is 0, whatever is in the buffer."""
    return torch.where(amount != 0, amount * t, 0)


def _guided(c, x, F, F_u, guidance):
    f = F.to(x.dtype)
    if F_u is None:
        return f
    w = guidance.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return f + _times(c[C.GUIDE] * (w - 1), f - F_u.to(x.dtype))


def _deviation(c, x, V):
    """The amount of z(draw_1): elementwise where V is given."""
    if V is None:
        return c[C.N1]
    v = (V.to(x.dtype) + 1) / 2
    return c[C.N1] + _times(c[C.N_V], torch.exp((v * c[C.LOG_MAX] + (1 - v) * c[C.LOG_MIN]) / 2))


def _flag(condition, x):
    return condition.reshape(-1, *[1] * (x.dim() - 1))


def _draws(seeds, draws, x):
    # Draws are 32-bit words, kept as int32 bit patterns.
    if draws.shape[0] == 1:
        return normal_float32(seeds, int(draws[0]) & MASK, Domain.STEP, x.shape[1:]).to(x.dtype)
    each = [normal_float32(s.reshape(1), int(d) & MASK, Domain.STEP, x.shape[1:]) for s, d in zip(seeds, draws, strict=True)]
    return torch.cat(each).to(x.dtype) if each else torch.empty_like(x)


def _fake(x, F, saved, history, net_in, seeds, coefficients, codes, row, F_u=None, guidance=None, V=None):
    return None


_register.define(
    "denoise_step",
    "(Tensor(a!) x, Tensor? F, Tensor(b!) saved, Tensor(c!) history, Tensor(d!) net_in, Tensor seeds,"
    " Tensor coefficients, Tensor codes, Tensor row, Tensor? F_u=None, Tensor? guidance=None, Tensor? V=None) -> ()",
    reference,
    _fake,
)


def denoise_step(
    x: torch.Tensor,  # float32 (or float64) [B, C, H, W], updated in place
    F: torch.Tensor | None,  # [B, C, H, W], the network's dtype; None: a row without evaluation
    saved: torch.Tensor,  # like x, or empty [0]
    history: torch.Tensor,  # [S, B, C, H, W] like x, S may be 0
    net_in: torch.Tensor,  # [k B, C, H, W], the network's dtype and memory format; k copies, one after another
    seeds: torch.Tensor,  # int64 [B]
    coefficients: torch.Tensor,  # [rows, len(C)], x's dtype
    codes: torch.Tensor,  # int32 [rows, len(K)]
    row: torch.Tensor,  # int64 [1], or [B]: a row per sample
    F_u: torch.Tensor | None = None,  # [B, C, H, W], the unconditional (or weaker) network's output
    guidance: torch.Tensor | None = None,  # w, x's dtype, [1] or [B]; comes with F_u
    V: torch.Tensor | None = None,  # [B, C, H, W], learned variance: -1 means LOG_MIN, 1 means LOG_MAX
) -> None:
    """Carry out one row of a plan in place; the module's docstring gives the formula.

    Noise is z(draw) = philox_normal(seeds, draw, domain=Domain.STEP), made in the kernel. Rows whose amounts are 0 make
    none. `row` and `guidance` are read on the device, so one captured graph serves every row and weight. Without F_u, G = F;
    without V, n_v is not used. F, F_u and V may be views of one output ([2 B, C, H, W] of a doubled batch, [B, 2 C, H, W] of
    a network that learns variances): strides that the pixels of a sample share are read where they are. Not differentiable.

    Raises: TypeError, ValueError naming the argument, its value and what is wanted.

    Bytes moved: x read and written, F read, net_in written; F_u, V, saved and history only where their coefficient is
    not 0.
    References: Ho and Salimans 2022, "Classifier-free diffusion guidance"; Kynkaanniemi et al. 2024, "Applying guidance in
    a limited interval"; Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models".
    """
    _check(x, F, saved, history, net_in, seeds, coefficients, codes, row, F_u, guidance, V)
    torch.ops.fastdiff.denoise_step(x, F, saved, history, net_in, seeds, coefficients, codes, row, F_u, guidance, V)


def _check(x, F, saved, history, net_in, seeds, coefficients, codes, row, F_u, guidance, V):
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: the sampler's state is float32 or float64, got {x.dtype}; convert it, F may stay {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x: expected [B, ...], got a tensor without dimensions; give it a batch of 1")
    tensors = {
        "x": x,
        "F": F,
        "F_u": F_u,
        "V": V,
        "saved": saved,
        "history": history,
        "net_in": net_in,
        "guidance": guidance,
    }
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values()):
        raise RuntimeError("denoise_step has no derivative; call it under torch.inference_mode() or torch.no_grad()")
    _check_shapes(x, tensors)
    _check_guidance(x, F, F_u, guidance, V)
    if saved.dtype != x.dtype or history.dtype != x.dtype or coefficients.dtype != x.dtype:
        raise TypeError(
            f"saved, history and coefficients must have x's dtype {x.dtype}, "
            f"got {saved.dtype}, {history.dtype} and {coefficients.dtype}"
        )
    _check_tables(x, seeds, coefficients, codes, row)
    everything = (*tensors.values(), seeds, coefficients, codes, row)
    devices = {t.device for t in everything if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}; move them to x's")


def _check_shapes(x, tensors):
    for name in ("F", "F_u", "V", "saved", "net_in"):
        tensor = tensors[name]
        if tensor is None or (name == "saved" and not tensor.numel()):
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}; use the network's dtype")
        if name == "net_in" and tensor.dim() == x.dim() and tensor.shape[1:] == x.shape[1:]:
            if tensor.shape[0] == x.shape[0] or (x.shape[0] and tensor.shape[0] and tensor.shape[0] % x.shape[0] == 0):
                continue
            raise ValueError(f"net_in: its batch {tensor.shape[0]} is no multiple of x's, {x.shape[0]}")
        if tensor.shape != x.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} differs from x, {tuple(x.shape)}")
    history = tensors["history"]
    if history.dim() != x.dim() + 1 or history.shape[1:] != x.shape:
        raise ValueError(f"history: expected [slots, *{tuple(x.shape)}], got {tuple(history.shape)}")


def _check_guidance(x, F, F_u, guidance, V):
    if F is None and (F_u is not None or V is not None):
        raise ValueError("F: None, a row without evaluation, but F_u or V is given; leave them out too")
    if (F_u is None) != (guidance is None):
        raise ValueError("F_u and guidance come together: the other branch's output and the weight w")
    if guidance is not None and (guidance.dtype != x.dtype or guidance.shape not in ((1,), x.shape[:1])):
        raise ValueError(
            f"guidance: expected {x.dtype} [1] or [{x.shape[0]}], got {guidance.dtype} {tuple(guidance.shape)}; "
            f"torch.full((1,), w, device=x.device) makes it"
        )


def _check_tables(x, seeds, coefficients, codes, row):
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

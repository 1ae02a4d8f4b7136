"""group_norm_attention: the attention block of a diffusion U-Net, norm, projections and residual included.

    h = GroupNorm(x)                                        (biased variance, per-channel weight and bias)
    q, k, v = W_qkv h + b_qkv                               per pixel, E channels each: heads of d = E / heads
    a = softmax(scale q^T k) v                              per head, over the pixels
    y = (x + W_out a + b_out) out_scale

Sums, statistics and softmax are float32 (float64 for float64).
"""

import torch

from fastdiff.ops import _register
from fastdiff.ops.group_norm_silu import _accumulate, statistics
from fastdiff.ops.group_norm_silu import _check as _check_norm
from fastdiff.ops.group_norm_silu import _jvp as _norm_jvp
from fastdiff.ops.group_norm_silu import reference as _norm
from fastdiff.ops.group_norm_silu import reference_backward as _norm_backward

SCORES = 2**28  # most scores that the derivatives hold at a time


def _rows(t):
    """[N, C, ...] -> [N, pixels, C]."""
    return t.flatten(2).mT if t.dim() > 2 else t[:, None]


def _images(rows, x):
    """[N, pixels, C] -> the shape of x [N, C, ...]."""
    return rows.mT.reshape(x.shape)


def _linear(rows, weight, bias):
    y = rows @ weight.to(rows.dtype).mT
    return y if bias is None else y + bias.to(rows.dtype)


def _heads(rows, parts, heads):
    """[N, pixels, parts heads d] -> `parts` tensors [N, heads, pixels, d]."""
    n, pixels, width = rows.shape
    return rows.reshape(n, pixels, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def _merged(*parts):
    """The inverse of _heads."""
    t = torch.stack(parts, 2)  # [N, heads, parts, pixels, d]
    return t.permute(0, 3, 2, 1, 4).flatten(2)


def _qkv(x, norm_weight, norm_bias, groups, eps, stats, qkv_weight, qkv_bias, heads):
    """h [N, pixels, C] and q, k, v [N, heads, pixels, d]."""
    h = _norm(x, norm_weight, norm_bias, groups, eps, None, None, None, stats, False)[0]
    h = _rows(h)
    return h, *_heads(_linear(h, qkv_weight, qkv_bias), 3, heads)


def reference(
    x, norm_weight, norm_bias, groups, eps, qkv_weight, qkv_bias, out_weight, out_bias, heads, scale, out_scale, stats
):
    stats = statistics(x, None, groups) if stats is None else stats.to(_accumulate(x), copy=True)
    v = x.to(_accumulate(x))
    _, q, k, values = _qkv(v, norm_weight, norm_bias, groups, eps, stats, qkv_weight, qkv_bias, heads)
    a = torch.softmax(scale * q @ k.mT, -1) @ values
    y = (_rows(v) + _linear(_merged(a), out_weight, out_bias)) * out_scale
    return torch.empty_like(x).copy_(_images(y, x)), stats


def _fake(
    x, norm_weight, norm_bias, groups, eps, qkv_weight, qkv_bias, out_weight, out_bias, heads, scale, out_scale, stats
):
    return torch.empty_like(x), x.new_empty((x.shape[0], groups, 2), dtype=_accumulate(x))


def _attention_backward(q, k, v, da, scale):
    """a and the gradients of q, k, v, each [N, heads, pixels, d]; products in their dtype, softmax in float32 or better."""
    accumulate = _accumulate(q)
    p = torch.softmax((q @ k.mT).to(accumulate) * scale, -1)
    weights = p.to(q.dtype)
    dp = (da @ v.mT).to(accumulate)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
    return weights @ v, ds @ k, ds.mT @ q, weights.mT @ da


def _gradients(
    dy, x, nw, nb, groups, eps, qw, qb, ow, ob, heads, scale, out_scale, stats, *, work, normalise, norm_backward
):
    """Gradients of x, the norm's parameters, W_qkv, b_qkv, W_out, b_out; q, k, v and the scores are computed again."""
    accumulate = _accumulate(x)
    h = _rows(normalise(x, nw, nb, groups, eps, None, None, None, stats, False)[0]).to(work)
    qkv = _heads(_linear(h, qw, qb), 3, heads)
    g = (_rows(dy).to(accumulate) * out_scale).to(work)  # [N, pixels, C]
    (da,) = _heads(g @ ow.to(work), 1, heads)
    together = max(1, SCORES // max(1, heads * h.shape[1] ** 2))  # samples
    chunks = zip(*(t.split(together) for t in (*qkv, da)), strict=True)
    parts = [_attention_backward(q, k, v, da, scale) for q, k, v, da in chunks]
    a, dq, dk, dv = (torch.cat(part) for part in zip(*parts, strict=True))
    dqkv, a = _merged(dq, dk, dv), _merged(a)
    dh = torch.empty_like(x).copy_(_images(dqkv @ qw.to(work), x))
    dx, dnw, dnb, *_ = norm_backward(dh, x, nw, nb, groups, eps, None, None, None, stats, False)

    def weight_gradient(of_rows, rows, like):
        return (of_rows.flatten(0, 1).mT @ rows.flatten(0, 1)).to(like.dtype)

    def bias_gradient(rows, like):
        return x.new_empty(0) if like is None else rows.sum((0, 1), dtype=accumulate).to(like.dtype)

    dx = dx.add_(_images(g, x))
    return (
        dx,
        dnw,
        dnb,
        weight_gradient(dqkv, h, qw),
        bias_gradient(dqkv, qb),
        weight_gradient(g, a, ow),
        bias_gradient(g, ob),
    )


def reference_backward(dy, x, *args):
    wide = x.to(_accumulate(x))
    dx, *others = _gradients(dy, wide, *args, work=wide.dtype, normalise=_norm, norm_backward=_norm_backward)
    return torch.empty_like(x).copy_(dx), *others


def _composed_backward(dy, x, *args):
    """Library products in x's dtype between the norm's own kernels."""
    ops = torch.ops.fastdiff
    forward, backward = ops.group_norm_silu, ops.group_norm_silu_backward
    return _gradients(dy, x, *args, work=x.dtype, normalise=forward, norm_backward=backward)


def _fake_backward(dy, x, nw, nb, groups, eps, qw, qb, ow, ob, heads, scale, out_scale, stats):
    def like(t):
        return x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    return torch.empty_like(x), like(nw), like(nb), like(qw), like(qb), like(ow), like(ob)


_ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, int groups, float eps, Tensor qkv_weight, Tensor? qkv_bias,"
    " Tensor out_weight, Tensor? out_bias, int heads, float scale, float out_scale, Tensor? stats"
)
_register.define("group_norm_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)", reference, _fake)
_register.define(
    "group_norm_attention_backward",
    f"(Tensor dy, {_ARGUMENTS.replace('Tensor? stats', 'Tensor stats')})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_backward,
    _fake_backward,
)
_register.compose("group_norm_attention_backward", _composed_backward)


def _save(args, out):
    x, nw, nb, groups, eps, qw, qb, ow, ob, heads, scale, out_scale, _ = args
    biases = [b for b in (qb, ob) if b is not None]
    given = (qb is not None, ob is not None)
    rest = {"groups": groups, "eps": eps, "heads": heads, "scales": (scale, out_scale), "outputs": 2, "given": given}
    return (x, nw, nb, qw, ow, out[1], *biases), rest


def _unpack(tensors, rest):
    x, nw, nb, qw, ow, stats, *biases = tensors
    qb, ob = (biases.pop(0) if given else None for given in rest["given"])
    return x, nw, nb, rest["groups"], rest["eps"], qw, qb, ow, ob, rest["heads"], *rest["scales"], stats


def _backward(tensors, rest, needs, dy, _dstats):
    found = torch.ops.fastdiff.group_norm_attention_backward(dy, *_unpack(tensors, rest))
    dx, dnw, dnb, dqw, dqb, dow, dob = found
    grads = (dx, dnw, dnb, None, None, dqw, dqb, dow, dob, None, None, None, None)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _product_tangent(a, b, da, db):
    """Tangent of a @ b; an absent tangent is zero."""
    terms = [t for t in (None if da is None else da @ b, None if db is None else a @ db) if t is not None]
    return sum(terms) if terms else None


def _jvp(tensors, rest, dx, dnw, dnb, _groups, _eps, dqw, dqb, dow, dob, *_):
    x, nw, nb, groups, eps, qw, qb, ow, _, heads, scale, out_scale, stats = _unpack(tensors, rest)
    v = x.to(_accumulate(x))
    wide = [None if t is None else t.to(v.dtype) for t in (dx, dnw, dnb, dqw, dqb, dow, dob)]
    dx, dnw, dnb, dqw, dqb, dow, dob = wide
    h, q, k, values = _qkv(v, nw, nb, groups, eps, stats, qw, qb, heads)
    settings = {"groups": groups, "eps": eps, "silu": False, "given": []}
    dh = _rows(_norm_jvp((v, nw, nb, stats), settings, dx, dnw, dnb, None, None, None, None, None))
    dqkv = _product_tangent(h, qw.to(v.dtype).mT, dh, None if dqw is None else dqw.mT)
    dq, dk, dvalues = _heads(dqkv if dqb is None else dqkv + dqb, 3, heads)
    p = torch.softmax(scale * q @ k.mT, -1)
    ds = scale * (dq @ k.mT + q @ dk.mT)
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    a, da = _merged(p @ values), _merged(dp @ values + p @ dvalues)
    dy = _product_tangent(a, ow.to(v.dtype).mT, da, None if dow is None else dow.mT)
    dy = dy if dob is None else dy + dob
    dy = _images(dy, x)
    return ((dy if dx is None else dy + dx) * out_scale).to(x.dtype)


_call = _register.differentiable("group_norm_attention", _save, _backward, _jvp)


def group_norm_attention(
    x: torch.Tensor,  # [N, C, ...]
    norm_weight: torch.Tensor,  # [C]
    norm_bias: torch.Tensor,  # [C]
    groups: int,
    qkv_weight: torch.Tensor,  # [3 E, C]
    qkv_bias: torch.Tensor | None,  # [3 E]
    out_weight: torch.Tensor,  # [C, E]
    out_bias: torch.Tensor | None,  # [C]
    heads: int,
    eps: float = 1e-5,
    stats: torch.Tensor | None = None,  # [N, groups, 2]
    out_scale: float = 1.0,
    scale: float | None = None,
) -> torch.Tensor:
    """The attention block (x + W_out softmax(scale q^T k) v + b_out) out_scale, q, k, v = W_qkv GroupNorm(x) + b_qkv.

    Args:
        x: [N, C, ...] float32, bfloat16, float16 or float64; any strides, the result keeps x's memory format. Attention
            runs over all pixels of a sample.
        norm_weight, norm_bias: [C], any floating dtype.
        groups: divides C.
        qkv_weight: [3 E, C]: the rows of q, then k, then v, each head after head; E may differ from C. 1x1 convolution
            weights are given as `weight.flatten(1)`.
        qkv_bias: [3 E] or None.
        out_weight: [C, E].
        out_bias: [C] or None.
        heads: divides E.
        eps: >= 0, added to the variance.
        stats: [N, groups, 2] mean and biased variance of x where they are known already. Derivatives treat them as
            functions of x.
        out_scale: factor of the sum: 1/sqrt(2) where skips are scaled (DDPM++).
        scale: of the scores; None: 1/sqrt(E / heads).

    Returns: like x. Differentiable in all tensors but stats, forward and reverse; the derivatives compute q, k, v and the
    scores again and hold at most 2^28 scores (backward) or all of them (forward mode).

    Raises: TypeError, ValueError naming argument, value and remedy.

    Bytes moved: x read twice, y written once, weights once; 8 N pixels C E operations in the projections and
    4 N pixels^2 E in the attention bound it. On CPUs all of it is ours, one sample's work in cache, and a sample's values
    do not depend on the batch. bfloat16 is rounded where the modules would round: h, q, k, v, the probabilities and a.
    References: Ho et al. 2020 (the block); Vaswani et al. 2017; Song et al. 2021 (the scaled skip).
    """
    _check(x, norm_weight, norm_bias, groups, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps, stats)
    if scale is None:
        scale = (out_weight.shape[1] // heads) ** -0.5
    args = (norm_weight, norm_bias, groups, float(eps), qkv_weight, qkv_bias, out_weight, out_bias, heads)
    return _call(x, *args, float(scale), float(out_scale), stats)[0]


def _check(x, norm_weight, norm_bias, groups, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps, stats):
    _check_norm(x, None, None, groups, eps, None, None, None, stats)
    c = x.shape[1]
    if not c:
        raise ValueError(f"x: {tuple(x.shape)} has no channels; expected [N, C, ...] with C >= 1")
    if out_weight.dim() != 2 or out_weight.shape[0] != c or not out_weight.shape[1]:
        raise ValueError(f"out_weight: {tuple(out_weight.shape)} does not fit x {tuple(x.shape)}; expected [{c}, E]")
    e = out_weight.shape[1]
    if heads < 1 or e % heads:
        raise ValueError(f"heads: {heads} does not divide the {e} inner channels of out_weight; choose a divisor of {e}")
    given = {
        "norm_weight": (norm_weight, (c,)),
        "norm_bias": (norm_bias, (c,)),
        "qkv_weight": (qkv_weight, (3 * e, c)),
        "qkv_bias": (qkv_bias, (3 * e,)),
        "out_weight": (out_weight, (c, e)),
        "out_bias": (out_bias, (c,)),
    }
    for name, (tensor, expected) in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected:
            shapes = f"x {tuple(x.shape)} and out_weight {tuple(out_weight.shape)}"
            raise ValueError(f"{name}: {tuple(tensor.shape)} does not fit {shapes}; expected {expected}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {x.device}; move it to {x.device}")

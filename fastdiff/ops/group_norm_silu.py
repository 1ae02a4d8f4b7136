"""group_norm_silu: the normalisation in front of every convolution of a diffusion U-Net, in one pass.

    v = x + add[n, c]                                   (convolution bias and additive time embedding)
    h = (v - mean_g) / sqrt(var_g + eps)                per sample and group of C/groups channels, biased variance
    a = h weight[c] + bias[c]
    s = a (1 + scale[n, c]) + shift[n, c]               (FiLM / adaptive normalisation)
    y = s sigmoid(s)  if silu else  s

Statistics are float32 (float64 for float64), by two passes: E[x^2] - E[x]^2 loses the variance of images far from 0.
"""

import torch
from torch.nn import functional

from fastdiff.ops import _register


def _channels(t, x):
    """[C] or [N, C] -> broadcastable over x [N, C, ...]."""
    return t.to(_accumulate(x)).reshape(*([1] if t.dim() == 1 else []), *t.shape, *[1] * (x.dim() - 2))


def _accumulate(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _shifted(x, add):
    v = x.to(_accumulate(x))
    return v if add is None else v + _channels(add, x)


def _grouped(v, groups):
    return v.reshape(v.shape[0], groups, v.shape[1] // groups * v[0, 0].numel() if v.shape[0] else 0)


def statistics(x, add, groups):
    """[N, groups, 2]: mean and biased variance of x + add."""
    g = _grouped(_shifted(x, add), groups)
    mean = g.mean(-1)
    return torch.stack((mean, (g - mean[..., None]).square().mean(-1)), -1)


def _normalised(x, add, groups, eps, stats):
    g = _grouped(_shifted(x, add), groups)
    mean, var = stats.to(g.dtype)[..., None].unbind(2)
    rstd = (var + eps).rsqrt()
    return ((g - mean) * rstd).reshape(x.shape), rstd


def _affine(h, weight, bias, scale, shift):
    a = h * _channels(weight, h) + _channels(bias, h)
    s = a
    if scale is not None:
        s = s * (1 + _channels(scale, h))
    if shift is not None:
        s = s + _channels(shift, h)
    return a, s


def reference(x, weight, bias, groups, eps, add, scale, shift, stats, silu):
    stats = statistics(x, add, groups) if stats is None else stats.to(_accumulate(x), copy=True)
    h, _ = _normalised(x, add, groups, eps, stats)
    _, s = _affine(h, weight, bias, scale, shift)
    y = functional.silu(s) if silu else s
    return torch.empty_like(x).copy_(y), stats


def _fake(x, weight, bias, groups, eps, add, scale, shift, stats, silu):
    return torch.empty_like(x), x.new_empty((x.shape[0], groups, 2), dtype=_accumulate(x))


def reference_backward(dy, x, weight, bias, groups, eps, add, scale, shift, stats, silu):
    """Gradients of x, weight, bias, add, scale, shift; empty where the argument is absent.

    stats count as functions of x, whether they were computed here or given.
    """
    h, rstd = _normalised(x, add, groups, eps, stats)
    a, s = _affine(h, weight, bias, scale, shift)
    ds = dy.to(h.dtype)
    if silu:
        sigma = torch.sigmoid(s)
        ds = ds * sigma * (1 + s * (1 - sigma))
    space = list(range(2, x.dim()))
    da = ds if scale is None else ds * (1 + _channels(scale, x))
    dh = da * _channels(weight, x)
    g, gh = _grouped(dh, groups), _grouped(h, groups)
    dv = rstd * (g - g.mean(-1, keepdim=True) - gh * (g * gh).mean(-1, keepdim=True))
    dv = dv.reshape(x.shape)
    none = x.new_empty(0)
    return (
        torch.empty_like(x).copy_(dv),
        (da * h).sum([0, *space]).to(weight.dtype),
        da.sum([0, *space]).to(bias.dtype),
        none if add is None else _total(dv, space).to(add.dtype),
        none if scale is None else _total(ds * a, space).to(scale.dtype),
        none if shift is None else _total(ds, space).to(shift.dtype),
    )


def _total(v, space):
    return v.sum(space) if space else v.clone()


def _fake_backward(dy, x, weight, bias, groups, eps, add, scale, shift, stats, silu):
    def like(t):
        return x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)

    return torch.empty_like(x), like(weight), like(bias), like(add), like(scale), like(shift)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? add, Tensor? scale, Tensor? shift,"
    " Tensor? stats, bool silu"
)
_register.define("group_norm_silu", f"({_ARGUMENTS}) -> (Tensor, Tensor)", reference, _fake)
_register.define(
    "group_norm_silu_backward",
    f"(Tensor dy, {_ARGUMENTS.replace('Tensor? stats', 'Tensor stats')})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference_backward,
    _fake_backward,
)


def _save(args, out):
    x, weight, bias, groups, eps, add, scale, shift, _, silu = args
    optional = {"add": add, "scale": scale, "shift": shift}
    given = [k for k in optional if optional[k] is not None]
    rest = {"groups": groups, "eps": eps, "silu": silu, "outputs": 2, "given": given}
    return (x, weight, bias, out[1], *[optional[k] for k in given]), rest


def _unpack(tensors, rest):
    x, weight, bias, stats, *given = tensors
    optional = dict(zip(rest["given"], given, strict=True))
    add, scale, shift = (optional.get(k) for k in ("add", "scale", "shift"))
    return x, weight, bias, rest["groups"], rest["eps"], add, scale, shift, stats, rest["silu"]


def _backward(tensors, rest, needs, dy, _dstats):
    args = _unpack(tensors, rest)
    dx, dw, db, dadd, dscale, dshift = torch.ops.fastdiff.group_norm_silu_backward(dy, *args)
    present = rest["given"]
    extras = [g if k in present else None for k, g in (("add", dadd), ("scale", dscale), ("shift", dshift))]
    grads = (dx, dw, db, None, None, *extras, None, None)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _jvp(tensors, rest, dx, dw, db, _groups, _eps, dadd, dscale, dshift, *_):
    x, weight, bias, groups, eps, add, scale, shift, stats, silu = _unpack(tensors, rest)
    h, rstd = _normalised(x, add, groups, eps, stats)
    a, s = _affine(h, weight, bias, scale, shift)
    dv = torch.zeros_like(h) if dx is None else dx.to(h.dtype)
    dv = dv if dadd is None else dv + _channels(dadd, x)
    g, gh = _grouped(dv, groups), _grouped(h, groups)
    dh = (rstd * (g - g.mean(-1, keepdim=True) - gh * (g * gh).mean(-1, keepdim=True))).reshape(x.shape)
    ds = dh * _channels(weight, x)
    ds = ds if dw is None else ds + h * _channels(dw, x)
    ds = ds if db is None else ds + _channels(db, x)
    ds = ds if scale is None else ds * (1 + _channels(scale, x))
    ds = ds if dscale is None else ds + a * _channels(dscale, x)
    ds = ds if dshift is None else ds + _channels(dshift, x)
    if silu:
        sigma = torch.sigmoid(s)
        ds = ds * sigma * (1 + s * (1 - sigma))
    return ds.to(x.dtype)


_call = _register.differentiable("group_norm_silu", _save, _backward, _jvp)


def group_norm_silu(
    x: torch.Tensor,  # [N, C, ...]
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    groups: int,
    eps: float = 1e-5,
    add: torch.Tensor | None = None,  # [N, C]
    scale: torch.Tensor | None = None,  # [N, C]
    shift: torch.Tensor | None = None,  # [N, C]
    stats: torch.Tensor | None = None,  # [N, groups, 2]
    silu: bool = True,
) -> torch.Tensor:
    """GroupNorm of x + add, optional per-sample scale and shift, optional SiLU; the module's docstring gives the formula.

    Args:
        x: [N, C, ...] float32, bfloat16, float16 or float64; any strides, the result keeps x's memory format.
        weight, bias: [C], any floating dtype.
        groups: divides C.
        eps: >= 0, added to the variance.
        add: [N, C], added to x before the statistics.
        scale, shift: [N, C]; s = a (1 + scale) + shift.
        stats: [N, groups, 2] mean and biased variance of x + add where they are known already. Derivatives treat them
            as functions of x.
        silu: apply s sigmoid(s).

    Returns: like x. Differentiable in all tensors but stats, forward and reverse.

    Raises: TypeError, ValueError naming argument, value and remedy.

    Bytes moved: x read once where a group fits on chip (twice otherwise), y written once.
    References: Wu and He 2018; Dhariwal and Nichol 2021 (scale and shift).
    """
    _check(x, weight, bias, groups, eps, add, scale, shift, stats)
    return _call(x, weight, bias, groups, float(eps), add, scale, shift, stats, silu)[0]


def _check(x, weight, bias, groups, eps, add, scale, shift, stats):
    if x.dim() < 2 or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor [N, C, ...], got {x.dtype} of shape {tuple(x.shape)}")
    n, c = x.shape[:2]
    if groups < 1 or c % groups:
        raise ValueError(f"groups: {groups} does not divide the {c} channels of x; choose a divisor of {c}")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} is negative; use a small number such as 1e-5")
    device = x.device
    for name, tensor, shape in (
        ("weight", weight, (c,)), ("bias", bias, (c,)), ("add", add, (n, c)), ("scale", scale, (n, c)),
        ("shift", shift, (n, c)), ("stats", stats, (n, groups, 2)),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: {tuple(tensor.shape)} does not fit x {tuple(x.shape)}; expected {shape}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: is on {tensor.device}, x on {device}; move it to {device}")

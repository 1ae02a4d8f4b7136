"""conv3x3: a U-Net's 3x3 convolution, with the norm in front of it, the residual and the next norm's statistics behind it.

    h = group_norm_silu(x, ...)  where a norm is given, else x
    z[n, o, r, s] = sum_{i, u, v} weight[o, i, u, v] h[n, i, r + u - 1, s + v - 1] + bias[o]
    y = (z + residual) out_scale
    stats[n, g] = mean and biased variance of y over the channels of group g and all pixels

h is 0 outside the image: the padding follows the norm. h is rounded to x's dtype, for "fp8" to eight bits instead; sums are
float32 or better.
"""

import torch
from torch.nn import functional

from fastdiff.ops import _fp8, _register
from fastdiff.ops._conv3x3_weights import Norm, conv3x3_pack, served
from fastdiff.ops._layout import image
from fastdiff.ops._winograd import OPERAND
from fastdiff.ops.conv3x3_weight_gradient import conv3x3_weight_gradient
from fastdiff.ops.group_norm_silu import _check as check_norm
from fastdiff.ops.group_norm_silu import _jvp as norm_jvp
from fastdiff.ops.group_norm_silu import _save as norm_save
from fastdiff.ops.group_norm_silu import group_norm_silu, statistics
from fastdiff.ops.group_norm_silu import reference as norm_reference


def _wide(t):
    return t if t.dtype == torch.float64 else t.float()


def _over_pixels(bias):
    """[O] or [N, O] -> broadcastable over [N, O, H, W]."""
    return _wide(bias)[..., None, None]


def _convolve(h, weight, bias=None):
    if h.numel() == 0:  # conv2d refuses images without pixels
        return h.new_zeros((h.shape[0], weight.shape[0], *h.shape[2:]))
    bias = None if bias is None else bias.to(h.dtype)
    return functional.conv2d(h, weight.to(h.dtype), bias, padding=1)


def _finish(h, x, weight, bias, residual, out_scale, stats_groups, packed, algorithm):
    """(y, stats): everything behind the norm."""
    if algorithm not in ("direct", "fp8"):
        raise ValueError(f"algorithm: {algorithm!r} has no kernel for {x.dtype} on {x.device} here; use direct")
    weight = weight if packed is None else packed
    later = bias is not None and (bias.dim() == 2 or algorithm == "fp8")
    y = _fp8.convolve(h, weight) if algorithm == "fp8" else _convolve(h, weight, None if later else bias)
    if later or residual is not None or out_scale != 1 or y.dtype != x.dtype:
        v = _wide(y)
        v = v + _over_pixels(bias) if later else v
        v = v if residual is None else v + _wide(residual)
        y = (v * out_scale).to(x.dtype)
    like = image(x, *y.shape[1:])
    y = y if y.stride() == like.stride() else like.copy_(y)
    return y, statistics(y, None, stats_groups) if stats_groups else _empty_stats(x, 0)


def _empty_stats(x, groups):
    return x.new_empty((x.shape[0], groups, 2), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _with(normalise):
    """The op with `normalise` as its group_norm_silu: (y, stats of y, stats of x)."""

    def run(
        x, weight, bias, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu,
        residual, out_scale, stats_groups, packed, algorithm,
    ):  # fmt: skip
        algorithm = algorithm if x.numel() else "direct"
        if algorithm == "fp8" and (norm_weight is None or packed is None):
            raise ValueError("algorithm: 'fp8' needs a norm, which says how large h is, and packed weights; use direct")
        h, of_x = _wide(x) if algorithm == "fp8" else x, _empty_stats(x, 0)
        packed = packed if x.numel() else None
        if norm_weight is not None:
            h, of_x = normalise(h, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu)
        return *_finish(h, x, weight, bias, residual, out_scale, stats_groups, packed, algorithm), of_x

    return run


def _served_norm(*args):
    return torch.ops.fastdiff.group_norm_silu(*args)


reference = _with(norm_reference)
composed = _with(_served_norm)


def _fake(
    x, weight, bias, norm_weight, norm_bias, groups, eps, add, scale, shift, stats, silu,
    residual, out_scale, stats_groups, packed, algorithm,
):  # fmt: skip
    y = image(x, weight.shape[0], *x.shape[2:])
    return y, _empty_stats(x, stats_groups), _empty_stats(x, 0 if norm_weight is None else groups)


_register.define(
    "conv3x3",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int groups, float eps, Tensor? add,"
    " Tensor? scale, Tensor? shift, Tensor? stats, bool silu, Tensor? residual, float out_scale, int stats_groups,"
    " Tensor? packed, str algorithm) -> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
)
_register.compose("conv3x3", composed)

# Positions of the arguments that may be absent, in the order in which they are saved.
_OPTIONAL = {"bias": 2, "norm_weight": 3, "norm_bias": 4, "add": 7, "scale": 8, "shift": 9, "residual": 12}


def _save(args, out):
    x, weight = args[:2]
    given = {k: args[i] for k, i in _OPTIONAL.items() if args[i] is not None}
    scalars = {"groups": args[5], "eps": args[6], "silu": args[11], "out_scale": args[13], "algorithm": args[16]}
    return (x, weight, out[2], *given.values()), scalars | {"given": list(given), "outputs": 3}


class _Saved:
    """What `_save` kept, by name; None where an argument was absent."""

    def __init__(self, tensors, rest):
        self.x, self.weight, self.stats, *given = tensors
        self.given = dict(zip(rest["given"], given, strict=True))
        self.rest, self.normed = rest, "norm_weight" in self.given

    def __getitem__(self, name):
        return self.given.get(name)

    def norm_arguments(self):
        """Those of group_norm_silu, with the statistics that the forward pass used."""
        affine = self["norm_weight"], self["norm_bias"], self.rest["groups"], self.rest["eps"]
        return self.x, *affine, self["add"], self["scale"], self["shift"], self.stats

    def hidden(self):
        """h, computed again: keeping it would double the memory of the activations."""
        arguments = (*self.norm_arguments(), self.rest["silu"]) if self.normed else ()
        return group_norm_silu(*arguments) if self.normed else self.x


def _convolution_backward(dy, h, weight, needs, algorithm):
    """Gradients of h and weight; by Winograd's algorithm, too, where its weights are soon packed."""
    if h.numel() == 0:
        return torch.zeros_like(h), torch.zeros_like(weight)
    dh, dw, wanted = None, None, list(needs)
    soon, again = algorithm == "winograd4_lean", torch.is_grad_enabled()  # a second derivative follows
    if needs[0] and soon:
        packed, back = conv3x3_pack(weight, algorithm, transposed=True), weight.transpose(0, 1)
        back = back.flip(2, 3) if again else back  # else its shape is read
        dh = conv3x3(dy, back, packed=packed, algorithm=algorithm)[0]
        wanted[0] = False
    if wanted[1] and soon and not again:
        dw = conv3x3_weight_gradient(dy, h).to(weight.dtype)
        wanted[1] = False
    if any(wanted):
        arguments = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False])
        direct, of_weight, _ = torch.ops.aten.convolution_backward(dy, h, weight.to(h.dtype), *arguments)
        dh = direct if dh is None else dh
        dw = of_weight.to(weight.dtype) if wanted[1] else dw
    return dh, dw


def _backward(tensors, rest, needs, dy, _dstats, _dof_x):
    saved, grads = _Saved(tensors, rest), [None] * 17
    dz = _wide(dy) if rest["out_scale"] == 1 else _wide(dy) * rest["out_scale"]
    if needs[2]:
        bias = saved["bias"]
        grads[2] = dz.sum((0, 2, 3) if bias.dim() == 1 else (2, 3)).to(bias.dtype)
    if needs[12]:
        grads[12] = dz.to(saved["residual"].dtype)
    inner = any(needs[i] for i in (0, 3, 4, 7, 8, 9))
    if inner or needs[1]:
        given = (dz.to(dy.dtype), saved.hidden(), saved.weight)
        grads[0], grads[1] = _convolution_backward(*given, (inner, needs[1]), rest["algorithm"])
    if inner and saved.normed:
        made = torch.ops.fastdiff.group_norm_silu_backward(grads[0], *saved.norm_arguments(), rest["silu"])
        for i, gradient in zip((0, 3, 4, 7, 8, 9), made, strict=True):
            grads[i] = gradient
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _jvp(tensors, rest, *tangents):
    saved = _Saved(tensors, rest)
    dx, dweight = tangents[:2]
    d = {k: tangents[i] for k, i in _OPTIONAL.items()}
    dh = dx
    if saved.normed:
        kept, norm_rest = norm_save((*saved.norm_arguments(), rest["silu"]), (None, saved.stats))
        dh = norm_jvp(kept, norm_rest, dx, d["norm_weight"], d["norm_bias"], None, None, d["add"], d["scale"], d["shift"])
    dy = 0 if dh is None else _wide(_convolve(dh, saved.weight))
    dy = dy if dweight is None else dy + _wide(_convolve(saved.hidden(), dweight))
    dy = dy if d["bias"] is None else dy + _over_pixels(d["bias"])
    dy = dy if d["residual"] is None else dy + _wide(d["residual"])
    return (dy * rest["out_scale"]).to(saved.x.dtype)


_twin = _register.differentiable("conv3x3", _save, _backward, _jvp)


def conv3x3(
    x: torch.Tensor,  # [N, I, H, W]
    weight: torch.Tensor,  # [O, I, 3, 3]
    bias: torch.Tensor | None = None,  # [O] or [N, O]
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,  # [N, O, H, W]
    out_scale: float = 1.0,
    stats_groups: int = 0,
    packed: torch.Tensor | None = None,
    algorithm: str = "direct",
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [N, O, H, W], [N, stats_groups, 2]
    """3x3 convolution, stride 1, padding 1, with norm, residual and statistics; the module's docstring gives the formula.

    Args:
        x: [N, I, H, W] float32, bfloat16, float16 or float64; any strides. y is channels-last where x is.
        weight: [O, I, 3, 3], any floating dtype.
        bias: [O], or [N, O]: a bias for each sample. An additive embedding that the next norm would take as its `add`
            belongs here, as bias + add: a group's statistics cannot be corrected for an `add` afterwards, since its variance
            then depends on the mean of every channel.
        norm: GroupNorm and SiLU of x on the way in, with all that `group_norm_silu` takes.
        residual: [N, O, H, W], x's dtype; added before the scale.
        out_scale: factor on the sum (DDPM++'s sqrt(1/2)); without a residual too.
        stats_groups: 0, or the number of groups of the next norm.
        packed: `conv3x3_pack(weight, algorithm)`, which then is what is multiplied; of `weight` only the shape is read, so
            that one element expanded to [O, I, 3, 3] may stand in for it. Derivatives read weight, not packed. Absent, it is
            made in every call, which costs more than it saves, but for "winograd4_lean": training packs its weights so.
        algorithm: "direct", or one of those that `conv3x3_algorithms(x.dtype, x.device)` names. "winograd4": F(4x4, 3x3),
            products in float32. "winograd4_lean": the same with weights that are transformed while they are used, which
            take a quarter of the memory and of its bandwidth. "winograd6": tiles of 6x6 beside those of 4x4, for sides from
            16 on, a sixth fewer products and twice the rounding, where there is AVX-512, for float32 alone.
            "winograd4_int16": F(4x4, 3x3), products of 16-bit integers, and "winograd2": F(2x2, 3x3), products of bfloat16,
            both for bfloat16 alone. "fp8": h and the weights rounded to eight bits (E4M3), for GPUs; a norm is needed, and
            the error is some twenty times that of bfloat16. Named by the caller, who keeps it: it does not depend on the
            batch. By Winograd's, y depends on neither batch nor threads, to the bit.

    Returns: (y, stats). y is like x with O channels. stats is None without stats_groups, else float32 (float64 for float64)
        mean and biased variance of y for `group_norm_silu(y, ..., stats=stats)`, taken before or after y is rounded to its
        dtype. y is differentiable in all tensors but norm.stats and packed, forward and reverse; stats is not: the norm that
        takes it differentiates through y.

    Raises: TypeError, ValueError naming argument, value and remedy.

    "direct" is composed of other ops everywhere: group_norm_silu by its kernel, PyTorch's convolution, the rest
    elementwise. That is no silent fallback, so FASTDIFF_STRICT=1 allows it where group_norm_silu has a kernel, and
    raises where it has none. Winograd's have a CPU kernel of their own, which does all of it, "fp8" has two for GPUs:
    docs/conv3x3.md.

    Bytes moved: x, residual and packed weights read once, y written once; "direct": several passes more.
    References: Ho 2020; Song 2021 and Karras 2022 (residual scaling); Lavin and Gray 2016 (Winograd, what packing is for).
    """
    _check(x, weight, bias, residual, stats_groups)
    if packed is not None:
        _check_tensor("packed", packed, x, types=() if algorithm == "direct" else OPERAND.values())
    packed = served(algorithm, x, weight, norm, packed)
    call = _twin if _register.functorch_active() else torch.ops.fastdiff.conv3x3
    first = norm or Norm(None, None, 1)  # type: ignore[arg-type]
    if norm is not None:
        _check_norm(x, *norm[:-1])
    y, stats, _ = call(
        x, weight, bias, first.weight, first.bias, first.groups, float(first.eps), first.add, first.scale, first.shift,
        first.stats, first.silu, residual, float(out_scale), stats_groups, packed, algorithm,
    )  # fmt: skip
    return y, stats if stats_groups else None


def _check_tensor(name, t, x, *shapes, types=()):
    """A floating-point tensor on x's device; types: others that are taken."""
    if not isinstance(t, torch.Tensor) or not (t.is_floating_point() or t.dtype in types):
        raise TypeError(f"{name}: expected a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.device != x.device:
        raise ValueError(f"{name}: is on {t.device}, x on {x.device}; move it to {x.device}")
    if shapes and tuple(t.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: {tuple(t.shape)} does not fit x {tuple(x.shape)}; expected {expected}")


def _check_norm(x, *arguments):
    try:
        check_norm(x, *arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"norm.{error}") from None


def _check(x, weight, bias, residual, stats_groups):
    if x.dim() != 4 or not x.is_floating_point() or not x.shape[1]:
        raise TypeError(f"x: expected a floating-point tensor [N, I, H, W], got {x.dtype} of shape {tuple(x.shape)}")
    n, inputs, height, width = x.shape
    outputs = weight.shape[0] if weight.dim() else 0
    _check_tensor("weight", weight, x, (max(outputs, 1), inputs, 3, 3))
    if bias is not None:
        _check_tensor("bias", bias, x, (outputs,), (n, outputs))
    if residual is not None:
        _check_tensor("residual", residual, x, (n, outputs, height, width))
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: is {residual.dtype}, x {x.dtype}; use residual.to({x.dtype})")
    if stats_groups < 0 or (stats_groups and outputs % stats_groups):
        raise ValueError(f"stats_groups: {stats_groups} does not divide the {outputs} channels of y; choose a divisor or 0")

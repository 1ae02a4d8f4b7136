"""embedding: sines and cosines of a time, the first layer of every diffusion U-Net.

    angle[b, i] = scale t[b] freqs[i],    out[b] = [sin(angle[b]), cos(angle[b])]   (or cosines first)

Positional embeddings have geometric frequencies (`frequencies`), Fourier features random ones and scale 2 pi. The angle is
formed and reduced in float64, the product of two float32 being exact there: at 1000 radians a float32 angle alone is wrong
by 3e-5.
"""

import torch

from fastdiff.ops import _register


def reference(t, freqs, scale, sin_first, dtype):
    angle = scale * torch.outer(t.double(), freqs.double())
    halves = (angle.sin(), angle.cos()) if sin_first else (angle.cos(), angle.sin())
    return torch.cat(halves, 1).to(dtype)


def _fake(t, freqs, scale, sin_first, dtype):
    return t.new_empty((t.shape[0], 2 * freqs.shape[0]), dtype=dtype)


_register.define(
    "embedding", "(Tensor t, Tensor freqs, float scale, bool sin_first, ScalarType dtype) -> Tensor", reference, _fake
)


def _save(args, out):
    t, freqs, scale, sin_first, dtype = args
    return (t, freqs), {"scale": scale, "sin_first": sin_first, "dtype": dtype, "outputs": 1}


def _sine_cosine(t, freqs, scale):
    """sin, cos of the angles [B, H] in float32, or in float64 where an argument is."""
    wide = torch.promote_types(torch.promote_types(t.dtype, freqs.dtype), torch.float32)
    return _call(t, freqs, scale, True, wide).chunk(2, 1)


def _backward(tensors, rest, needs, grad):
    t, freqs = tensors
    sin, cos = _sine_cosine(t, freqs, rest["scale"])
    of_sin, of_cos = grad.to(sin.dtype).chunk(2, 1)[:: 1 if rest["sin_first"] else -1]
    angle = rest["scale"] * (of_sin * cos - of_cos * sin)  # [B, H]
    dt = (angle * freqs.to(angle.dtype)).sum(1).to(t.dtype) if needs[0] else None
    dfreqs = (angle * t.to(angle.dtype)[:, None]).sum(0).to(freqs.dtype) if needs[1] else None
    return dt, dfreqs, None, None, None


def _jvp(tensors, rest, dt, dfreqs, *_):
    t, freqs = tensors
    sin, cos = _sine_cosine(t, freqs, rest["scale"])
    angle = torch.zeros_like(sin)
    if dt is not None:
        angle = angle + torch.outer(dt.to(sin.dtype), freqs.to(sin.dtype))
    if dfreqs is not None:
        angle = angle + torch.outer(t.to(sin.dtype), dfreqs.to(sin.dtype))
    halves = (rest["scale"] * angle * cos, -rest["scale"] * angle * sin)
    return torch.cat(halves if rest["sin_first"] else halves[::-1], 1).to(rest["dtype"])


_call = _register.differentiable("embedding", _save, _backward, _jvp)


def frequencies(
    count: int,
    max_period: float = 10000.0,
    freq_shift: float = 1.0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """float32 [count]: max_period^(-i / (count - freq_shift)), i = 0 ... count - 1.

    freq_shift 1 ends at 1 / max_period (DDPM, score SDE, EDM's DDPM++ "endpoint"); 0 stops one step before it (Improved
    DDPM, ADM). diffusers' flip_sin_to_cos=True is sin_first=False in `embedding`.
    """
    if count < 0 or not max_period > 0 or not freq_shift <= 1:
        raise ValueError(
            f"frequencies: count {count}, max_period {max_period}, freq_shift {freq_shift}; "
            f"need count >= 0, max_period > 0, freq_shift <= 1"
        )
    steps = max(count - freq_shift, 1)  # a single frequency is 1
    return (max_period ** (-torch.arange(count, dtype=torch.float64, device=device) / steps)).float()


def embedding(
    t: torch.Tensor,  # [B]
    freqs: torch.Tensor,  # [H]
    sin_first: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[sin(scale t freqs), cos(scale t freqs)] of every time t, or cosines first.

    Args:
        t: [B] times, any floating dtype; integers (step indices) are taken as numbers of freqs' dtype.
        freqs: [H], any floating dtype, radians per unit of t; `frequencies` makes the usual ones.
        sin_first: sines then cosines (DDPM, score SDE, EDM's SongUNet); False: cosines then sines (ADM, EDM's
            DhariwalUNet, diffusers with flip_sin_to_cos).
        scale: on every angle: 2 pi for Fourier features.
        dtype: of the result; t's by default.

    Returns: [B, 2 H]. Differentiable in t and freqs, forward and reverse, any number of times. Where t and freqs are at
    most float32, values are right to float32's rounding for |angle| <= 1e8; on GPUs the error then grows as |angle| 2^-52.

    Raises: TypeError, ValueError naming the argument.

    Bytes moved: 2 B H results written; nothing else of that size. References: Vaswani et al. 2017; Tancik et al. 2020.
    """
    for name, tensor in (("t", t), ("freqs", freqs)):
        if tensor.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(tensor.shape)}; flatten it")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name}: expected real numbers, got {tensor.dtype}; convert it to float32")
    if not freqs.is_floating_point():
        raise TypeError(f"freqs: expected a floating-point tensor, got {freqs.dtype}; convert it to float32")
    if freqs.device != t.device:
        raise ValueError(f"freqs: is on {freqs.device}, t on {t.device}; move it to {t.device}")
    t = t if t.is_floating_point() else t.to(freqs.dtype)
    dtype = t.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: {dtype} is not a floating-point type; use torch.float32, bfloat16, float16 or float64")
    return _call(t, freqs, float(scale), bool(sin_first), dtype)

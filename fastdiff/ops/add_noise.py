"""add_noise: every tensor a training step needs, each one a linear form in (x0, n), in one pass over x0.

    out[k, b] = coefficients[b, k, 0] x0[b] + coefficients[b, k, 1] n[b],    n[b] = philox_normal(seeds[b], draw)

The noised image x_t = alpha x0 + sigma n is one such form; so are the targets eps, x0, v, flow velocity and EDM's F,
and the second image x_r of a consistency pair, which shares its noise by construction.
"""

import torch

from fastdiff.ops import _register
from fastdiff.ops.philox_normal import Domain, normal_float32


def reference(x0, seeds, coefficients, draw, domain):
    acc = torch.float64 if x0.dtype == torch.float64 else torch.float32
    n = normal_float32(seeds, draw, domain, x0.shape[1:]).to(acc)
    c = coefficients.to(acc).movedim(1, 0)  # [K, B, 2]
    c = c.reshape(*c.shape, *[1] * (x0.dim() - 1))
    return (c[:, :, 0] * x0.to(acc) + c[:, :, 1] * n).to(x0.dtype).contiguous()


def _fake(x0, seeds, coefficients, draw, domain):
    return x0.new_empty((coefficients.shape[1], *x0.shape))


_register.define(
    "add_noise", "(Tensor x0, Tensor seeds, Tensor coefficients, int draw, int domain) -> Tensor", reference, _fake
)


def _save(args, out):
    x0, seeds, coefficients, draw, domain = args
    return (x0, seeds, coefficients), {"draw": draw, "domain": domain, "outputs": 1}


def _noise(x0, seeds, rest):
    return torch.ops.fastdiff.philox_normal(seeds, rest["draw"], rest["domain"], x0.shape[1:], torch.float32).to(x0.dtype)


def _spread(c, x0):
    """[B, K] coefficients -> [K, B, 1, ...]."""
    c = c.to(x0.dtype).t()
    return c.reshape(*c.shape, *[1] * (x0.dim() - 1))


def _backward(tensors, rest, needs, grad):
    x0, seeds, coefficients = tensors
    dx0 = (_spread(coefficients[..., 0], x0) * grad).sum(0) if needs[0] else None
    dc = None
    if needs[2]:
        flat = grad.movedim(1, 0).flatten(2)  # [B, K, D]
        pair = torch.stack((x0, _noise(x0, seeds, rest)), -1).flatten(1, -2)  # [B, D, 2]
        dc = torch.matmul(flat, pair).to(coefficients.dtype)
    return dx0, None, dc, None, None


def _jvp(tensors, rest, dx0, dseeds, dc, *_):
    x0, seeds, coefficients = tensors
    out = x0.new_zeros((coefficients.shape[1], *x0.shape))
    if dx0 is not None:
        out = out + _spread(coefficients[..., 0], x0) * dx0
    if dc is not None:
        out = out + _spread(dc[..., 0], x0) * x0 + _spread(dc[..., 1], x0) * _noise(x0, seeds, rest)
    return out


_call = _register.differentiable("add_noise", _save, _backward, _jvp)


def add_noise(
    x0: torch.Tensor,  # [B, ...]
    seeds: torch.Tensor,  # int64 [B]
    coefficients: torch.Tensor,  # [B, K, 2]
    draw: int = 0,
    domain: int = Domain.TRAINING,
) -> torch.Tensor:
    """K linear forms in (x0, n), with n made in the kernel.

    out[k, b] = coefficients[b, k, 0] x0[b] + coefficients[b, k, 1] n[b]

    Args:
        x0: [B, ...] data, any floating dtype; arithmetic is float32 (float64 for float64).
        seeds: int64 [B] bit patterns, one per sample.
        coefficients: [B, K, 2], float32 or float64; `Denoiser.noising_coefficients` makes them from times.
        draw, domain: which noise of the sample, as in `philox_normal`.

    Returns: [K, B, ...] in x0's dtype, contiguous. Differentiable in x0 and coefficients, forward and reverse.

    Raises: TypeError, ValueError naming the argument.

    Bytes moved: x0 read once, K results written once; the noise is never stored.
    """
    if x0.dim() < 1 or not x0.is_floating_point():
        raise TypeError(f"x0: expected a floating-point tensor [B, ...], got {x0.dtype} of shape {tuple(x0.shape)}")
    if seeds.dtype != torch.int64 or seeds.shape != x0.shape[:1]:
        raise TypeError(
            f"seeds: expected int64 [{x0.shape[0]}], got {seeds.dtype} of shape {tuple(seeds.shape)}; "
            f"make it with fastdiff.ops.seed_tensor, one seed per sample"
        )
    if coefficients.dim() != 3 or coefficients.shape[0] != x0.shape[0] or coefficients.shape[2] != 2:
        raise ValueError(f"coefficients: expected [{x0.shape[0]}, K, 2], got {tuple(coefficients.shape)}")
    if not coefficients.is_floating_point():
        raise TypeError(f"coefficients: expected a floating-point tensor, got {coefficients.dtype}; use float32 or float64")
    return _call(x0, seeds, coefficients, draw, int(domain))

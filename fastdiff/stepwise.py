"""What the loop does beside the fused ops: given noise, and estimates changed in ways that no row of a plan can."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdiff.ops.langevin_step import L, Norms


def given(noise: Sequence[Tensor] | None, needed: int, name: str, x: Tensor) -> list[Tensor] | None:
    """The given draws like x, or None; ValueError where there are too few."""
    if noise is None:
        return None
    if len(noise) < needed:
        raise ValueError(f"noise: {name} uses {needed} draws after the start, {len(noise)} given; give all of them")
    return [z.to(x) for z in noise]


def add(
    noise: list[Tensor],
    amounts: dict[int, float],
    learned: tuple[float, float] | None,
    V: Tensor | None,
    x: Tensor,
    net_in: Tensor,
    c_in: float,
) -> None:
    """Add a row's noise from the given draws, after `denoise_step` has added none, and make the next input again."""
    for k, (draw, amount) in enumerate(amounts.items()):
        std: float | Tensor = amount
        if k == 0 and learned is not None and V is not None:
            v = (V.to(x.dtype) + 1) / 2
            std = amount + torch.exp((v * learned[1] + (1 - v) * learned[0]) / 2)
        x += std * noise[draw]
    if amounts:
        _refill(net_in, c_in, x)


def langevin(x: Tensor, F: Tensor, z: Tensor, net_in: Tensor, c: Sequence[float], norms: int) -> None:
    """`langevin_step` with the given noise z; c is the row's coefficients."""
    score = c[L.SCORE_X] * x + c[L.SCORE_F] * F.to(x.dtype)
    of_z, of_score = (v.flatten(1).norm(dim=1) for v in (z, score))
    if norms == Norms.BATCH:
        of_z, of_score = of_z.mean(0, keepdim=True), of_score.mean(0, keepdim=True)
    ratio = torch.where(of_score == 0, 0, of_z / of_score).reshape(-1, *[1] * (x.dim() - 1))
    eps = c[L.STEP] * ratio.square()
    x += eps * score + (2 * eps).sqrt() * z
    _refill(net_in, c[L.NEXT_IN], x)


def _refill(net_in: Tensor, c_in: float, x: Tensor) -> None:
    for part in net_in.split(max(len(x), 1)):
        part.copy_(c_in * x)


def adjusted(
    x: Tensor,
    F: Tensor,
    F_u: Tensor | None,
    weight: Tensor | None,
    guide: float,
    skip: float,
    out: float,
    adjust: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The output that makes D what adjust(D, unguided D) makes of it, guidance included; D = skip x + out F."""
    f = F.to(x.dtype)
    unguided = skip * x + out * f
    d = unguided
    if F_u is not None and weight is not None:
        w = weight.to(x).reshape(-1, *[1] * (x.dim() - 1))
        d = d + out * guide * (w - 1) * (f - F_u.to(x.dtype))
    return (adjust(d, unguided) - skip * x) / out

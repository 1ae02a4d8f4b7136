"""What the loop does beside the fused ops: guidance, given noise, and estimates changed in ways that no row can."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.denoise_step import C
from fastdiff.ops.langevin_step import L, Norms


@dataclasses.dataclass(frozen=True)
class Guidance:
    """F_u + weight (F - F_u) in place of F.

    F_u is the network's own output for the labels `without` (classifier-free guidance, one doubled batch) or that of
    another, weaker network (autoguidance). interval: lowest and highest sigma / alpha where it applies.
    """

    weight: Tensor  # [1] or [B]
    without: Tensor | None = None  # int64 [B]
    network: Callable[..., Tensor] | None = None
    interval: tuple[float, float] | None = None

    @property
    def copies(self) -> int:
        """Of the batch in one network call."""
        return 2 if self.network is None else 1


def outputs(network, net_in: Tensor, c_noise: Tensor, labels, guidance, channels: int):
    """F, F_u and V, the last two None where there are none."""
    extra = [] if labels is None else [labels]
    if guidance is None:
        out, out_u = network(net_in, c_noise, *extra), None
    elif guidance.network is not None:
        out, out_u = network(net_in, c_noise, *extra), guidance.network(net_in, c_noise, *extra)
    else:
        out, out_u = network(net_in, c_noise, torch.cat([labels, guidance.without])).chunk(2)
    if out.shape[1] == channels:
        return out, out_u, None
    # a network that learns variances returns them in as many channels again
    return out[:, :channels], None if out_u is None else out_u[:, :channels], out[:, channels:]


def given(noise: Sequence[Tensor] | None, needed: int, name: str, x: Tensor) -> list[Tensor] | None:
    """The given draws like x, or None; ValueError where there are too few."""
    if noise is None:
        return None
    if len(noise) < needed:
        raise ValueError(f"noise: {name} uses {needed} draws after the start, {len(noise)} given; give all of them")
    return [z.to(x) for z in noise]


def column(values: np.ndarray, x: Tensor) -> Tensor:
    """A number for all samples, or one for each, against x."""
    return torch.from_numpy(np.asarray(values)).to(x).reshape(-1, *[1] * (x.dim() - 1))


def add(noise: list[Tensor], draws: Sequence[int], c: np.ndarray, V: Tensor | None, x: Tensor, net_in: Tensor) -> None:
    """Add a row's noise from the given draws, after `denoise_step` has added none, and make the next input again.

    c: the row's coefficients, [1 or B, len(C)].
    """
    for k, draw in enumerate(draws):
        std = column(c[:, C.N1 + k], x)
        if k == 0 and V is not None:
            v, low, high = (V.to(x.dtype) + 1) / 2, column(c[:, C.LOG_MIN], x), column(c[:, C.LOG_MAX], x)
            std = std + column(c[:, C.N_V], x) * torch.exp((v * high + (1 - v) * low) / 2)
        x += std * noise[draw]
    if draws:
        refill(net_in, c[:, C.NEXT_IN], x)


def langevin(x: Tensor, F: Tensor, z: Tensor, net_in: Tensor, c: Sequence[float], norms: int) -> None:
    """`langevin_step` with the given noise z; c is the row's coefficients."""
    score = c[L.SCORE_X] * x + c[L.SCORE_F] * F.to(x.dtype)
    of_z, of_score = (v.flatten(1).norm(dim=1) for v in (z, score))
    if norms == Norms.BATCH:
        of_z, of_score = of_z.mean(0, keepdim=True), of_score.mean(0, keepdim=True)
    ratio = torch.where(of_score == 0, 0, of_z / of_score).reshape(-1, *[1] * (x.dim() - 1))
    eps = c[L.STEP] * ratio.square()
    x += eps * score + (2 * eps).sqrt() * z
    refill(net_in, c[L.NEXT_IN], x)


def refill(net_in: Tensor, c_in: float | np.ndarray, x: Tensor) -> None:
    """net_in <- c_in x, every copy of it."""
    for part in net_in.split(max(len(x), 1)):
        part.copy_(column(np.asarray(c_in), x) * x)


def denoised(
    x: Tensor,
    F: Tensor,
    F_u: Tensor | None,
    weight: Tensor | None,
    guide: np.ndarray,
    skip: np.ndarray,
    out: np.ndarray,
    adjust: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """adjust(D, unguided D), guidance included; D = skip x + out F. guide, skip, out: numbers for all, or one for each."""
    f, c_skip, c_out = F.to(x.dtype), column(skip, x), column(out, x)
    unguided = c_skip * x + c_out * f
    d = unguided
    if F_u is not None and weight is not None:
        w = weight.to(x).reshape(-1, *[1] * (x.dim() - 1))
        d = d + c_out * column(guide, x) * (w - 1) * (f - F_u.to(x.dtype))
    return adjust(d, unguided)

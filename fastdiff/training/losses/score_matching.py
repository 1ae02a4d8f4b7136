"""Score matching without a target, for small problems; it differentiates the network twice.

Implicit (Hyvärinen 2005):  J = E[tr grad s + ||s||^2 / 2], the trace exact, one derivative per pixel
Sliced (Song et al. 2019):  J = E_v[v^T grad s v + ||s||^2 / 2], v ~ N(0, I): the trace by one random projection

E ||s - grad log p_t||^2 / 2 is J plus a constant. Here p_t is the data's density under the noise of level t, s follows
from D, and J is weighted by sigma^2 / (number of pixels) and averaged over levels, as in NCSN.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.denoiser import Denoiser
from fastdiff.training.losses.base import Draw, Loss, above, column, linear_forms, spread
from fastdiff.training.losses.ncsn import level_times


@dataclasses.dataclass(kw_only=True)
class ImplicitScoreMatching(Loss):
    """levels: as in `NCSNLoss`; 1 is the schedule's smallest noise alone."""

    levels: int = 1
    largest: ClassVar[int | None] = 1024

    def __post_init__(self):
        above("levels", self.levels, 1, equal=True)

    def __call__(self, network, batch):
        size = batch.x0[0].numel()
        if self.largest is not None and size > self.largest:
            raise ValueError(
                f"x0: the exact trace takes one derivative for each of {size} pixels; use the loss 'sliced' beyond "
                f"{self.largest}"
            )
        t = level_times(self.schedule, batch, self.levels)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        denoise = Denoiser(network, self.schedule, self.prediction)
        with torch.enable_grad():  # of s in x, also where nothing is trained
            x = linear_forms(batch, (alpha, sigma))[0].requires_grad_()
            d = denoise(x, t, batch.labels)
            score = (column(alpha, x) * d - x) / column(sigma**2, x)
            objective = self.trace(score, x, batch.seeds) + 0.5 * score.square().flatten(1).sum(1)
        return spread(sigma**2 / size, x) * objective

    def trace(self, score: Tensor, x: Tensor, seeds: Tensor) -> Tensor:
        """tr grad s [B]."""
        flat, total = score.flatten(1), torch.zeros(len(x), device=x.device)
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, i].sum(), x, create_graph=True)
            total = total + row.flatten(1)[:, i]
        return total


@dataclasses.dataclass(kw_only=True)
class SlicedScoreMatching(ImplicitScoreMatching):
    """The variant of reduced variance: ||s||^2 in place of (v^T s)^2, since E_v of it is known."""

    largest: ClassVar[int | None] = None

    def trace(self, score, x, seeds):
        v = ops.philox_normal(seeds.to(x.device), Draw.PROJECTION, x.shape[1:], domain=ops.Domain.AUGMENT)
        (product,) = torch.autograd.grad((score * v).sum(), x, create_graph=True)
        return (product * v).flatten(1).sum(1)

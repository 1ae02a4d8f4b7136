"""Easy consistency tuning (Geng et al. 2024): the diffusion loss with its target moved from x0 to D at a nearby r < t.

    ln t ~ N(p_mean, p_std^2),   r = max(0, t (1 - n(t) / q^(stage+1))),   n(t) = 1 + k sigmoid(-b t)
    L = (sqrt(||D(x_t, t) - sg D(x_r, r)||^2 + c^2) - c) / (t - r),   D(x_0, 0) = x0

x_t and x_r share their noise, both evaluations the dropout mask. As the stages go on r approaches t.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from fastdiff.denoiser import Denoiser
from fastdiff.training.losses.base import Loss, above, column, linear_forms, normals, same_dropout, spread
from fastdiff.training.losses.consistency import needs_edm_path
from fastdiff.training.losses.distances import Distance

K_SIGMOID, B_SIGMOID = 8.0, 1.0


def earlier_time(t: np.ndarray, q: float, stage: int) -> np.ndarray:
    """r(t), 0 where the gap would reach past 0."""
    n = 1 + K_SIGMOID / (1 + np.exp(B_SIGMOID * t))
    return np.maximum(0.0, t * (1 - n / q ** (stage + 1)))


@dataclasses.dataclass(kw_only=True)
class ECTLoss(Loss):
    """q: the gap t - r shrinks as q^-(stage + 1); stages: their number, of equal length; c: of the pseudo-Huber distance
    per root pixel, 0 being the plain norm."""

    q: float = 2.0
    stages: int = 8
    c: float = 0.0
    p_mean: float = -1.1
    p_std: float = 2.0

    family: ClassVar[str] = "consistency"

    def __post_init__(self):
        needs_edm_path(self.schedule)
        if not self.q >= 1:
            raise ValueError(f"q: {self.q} would put r after t; use q >= 1 (1: r = 0 always, the diffusion loss)")
        above("stages", self.stages, 1, equal=True)
        self.distance = Distance("huber", self.c)

    def __call__(self, network, batch):
        t = np.clip(np.exp(self.p_mean + self.p_std * normals(batch.seeds)), 1e-4, self.schedule.t_max)
        r = earlier_time(t, self.q, min(int(batch.progress * self.stages), self.stages - 1))
        denoise = Denoiser(network, self.schedule, self.prediction)
        x_t, x_r = linear_forms(batch, (np.ones_like(t), t), (np.ones_like(r), r))
        with same_dropout(x_t), torch.no_grad():
            d_r = denoise(x_r, np.maximum(r, 1e-4), batch.labels)
        d_t = denoise(x_t, t, batch.labels)
        return self.distance(d_t, torch.where(column(r == 0, x_t), batch.x0, d_r)) / spread(t - r, d_t)

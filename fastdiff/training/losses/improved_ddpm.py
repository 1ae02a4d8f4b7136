"""Improved DDPM (Nichol and Dhariwal 2021): the variance of the reverse step is learned too.

    log Sigma = (1 + V)/2 log beta_t + (1 - V)/2 log beta~_t,      V the network's second half, beta~_0 := beta~_1
    L_t = KL(q(x_{t-1} | x_t, x0) || N(mu, Sigma)), L_0 = -log p(x0 | x_1) with 256 levels per pixel; bits per pixel
    L_hybrid = L_simple + lambda sum_t L_t, where Sigma alone feels the second term

The two means differ by a multiple of D - x0, and so of F - F*: the bound needs no tensor but those of L_simple.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.schedules import DDPM
from fastdiff.training.losses.base import (
    Loss,
    above,
    column,
    evaluate,
    linear_forms,
    one_of,
    regression_forms,
    spread,
    uniforms,
)
from fastdiff.training.losses.importance import ImportantTimes

HALF_BIN = 1 / 255  # of a pixel's 256 levels in [-1, 1]


@dataclasses.dataclass(kw_only=True)
class ImprovedDDPMLoss(Loss):
    """objective: "hybrid", or "vlb", the bound alone; lambda_vlb: the hybrid's weight on the bound, which sums T steps;
    importance: draw t by the size of its loss (the paper does for "vlb" alone)."""

    objective: str = "hybrid"
    lambda_vlb: float = 1e-3
    importance: bool = False

    def __post_init__(self):
        one_of("objective", self.objective, ("hybrid", "vlb"))
        above("lambda_vlb", self.lambda_vlb, 0, equal=True)
        if not isinstance(self.schedule, DDPM):
            raise ValueError(f"schedule: learned variances need the discrete DDPM, got {type(self.schedule).__name__}")
        if not self.prediction.learned_variance:
            raise ValueError("prediction: it has no variance to learn; use Prediction(..., learned_variance=True)")
        self.T, self.table = self.schedule.T, _posterior(self.schedule)
        self.important = ImportantTimes(self.schedule.T) if self.importance else None

    def __call__(self, network, batch):
        T, u = self.T, uniforms(batch.seeds)
        if self.important is None:
            t, weight = np.minimum((u * T).astype(int), T - 1), np.ones(len(u))
        else:
            t, weight = self.important.draw(u)
        c_noise, forms = regression_forms(self.schedule, self.prediction, t)
        net_in, target = linear_forms(batch, *forms)
        f, v = evaluate(network, self.prediction, net_in, c_noise, batch.labels)
        assert v is not None
        if self.objective == "vlb":
            loss = T * self.bound(f - target, v, batch.x0, t)
        else:
            simple = (f - target).square().flatten(1).mean(1)
            loss = simple + self.lambda_vlb * T * self.bound((f - target).detach(), v, batch.x0, t)
        if self.important is not None and torch.is_grad_enabled():
            self.important.remember(batch.seeds, t, loss)
        return spread(weight, loss) * loss

    def bound(self, error: Tensor, v: Tensor, x0: Tensor, t: np.ndarray) -> Tensor:
        """L_t in bits per pixel, [B]; error = F - F*, v the place of log Sigma."""

        low, high, from_x0 = (column(values, x0) for values in self.table[t].T)
        log_variance = low + (high - low) * (v + 1) / 2
        off = column(self.prediction.coefficients(self.schedule, t).c_out, x0) * error  # D - x0
        # KL of two normals: the difference of their means, over the model's variance.
        gap = log_variance - low
        kl = 0.5 * (gap - 1 + torch.exp(-gap) + (from_x0 * off) ** 2 * torch.exp(-log_variance))
        nll = -_log_probability(x0.float(), off, log_variance)
        return torch.where(column(t == 0, x0), nll, kl).flatten(1).mean(1) / math.log(2)

    def after_step(self, network, progress):
        if self.important is not None:
            self.important.update()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.important is None else {"history": torch.tensor(self.important.history)}

    def load_state_dict(self, state):
        if self.important is not None:
            self.important.history = state["history"].cpu().numpy().copy()


def _posterior(schedule: DDPM) -> np.ndarray:
    """[T, 3]: log beta~_t, log beta_t, and the share of x0 in the mean of q(x_{t-1} | x_t, x0)."""
    beta, abar = schedule.betas, np.cumprod(1 - schedule.betas)
    before = np.append(1.0, abar[:-1])
    small = beta * (1 - before) / (1 - abar)
    small[0] = small[1]
    return np.stack((np.log(small), np.log(beta), beta * np.sqrt(before) / (1 - abar)), 1)


def _log_probability(x0: Tensor, off: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(x0 + off, variance) has on the pixel's level; the outermost levels reach to infinity."""
    scale, distance = torch.exp(-0.5 * log_variance), off.abs()
    # Both edges from the side of the nearer tail, where a difference of two small numbers keeps its digits.
    near, far = (torch.special.ndtr(-(distance + h) * scale) for h in (-HALF_BIN, HALF_BIN))
    inner = (near - far).clamp(min=1e-12).log()
    # The mean lies `off` above x0: the darkest level's mass is below its upper edge, the brightest's above its lower.
    below = torch.special.log_ndtr((HALF_BIN - off) * scale)
    above = torch.special.log_ndtr((HALF_BIN + off) * scale)
    return torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, above, inner))

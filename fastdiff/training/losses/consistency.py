"""Consistency models (Song et al. 2023) and improved consistency training (Song and Dhariwal 2024).

On a grid sigma_min = t_1 < ... < t_N = sigma_max, even in t^(1/rho), with x_t = x0 + t n:

    L = lambda(t) d(f(x_t, t), sg f-(x_r, r)),   t = t_{n+1}, r = t_n

Training takes x_r = x0 + r n, with the noise of x_t bit for bit. Distillation takes the step of the teacher's ODE solver
from x_t. f- has the network's own weights, or their moving average ("target network"); both evaluations drop the same
units. With the prediction "consistency" f(x, sigma_min) = x whatever the network says.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.denoiser import Denoiser
from fastdiff.schedules import EDM, Schedule, karras
from fastdiff.training.losses import curricula
from fastdiff.training.losses.base import Batch, Loss, above, column, linear_forms, one_of, same_dropout, spread, uniforms
from fastdiff.training.losses.distances import Distance


def needs_edm_path(schedule: Schedule) -> None:
    """ValueError but for x_t = x0 + t n."""
    if not isinstance(schedule, EDM):
        raise ValueError(f"schedule: consistency losses need EDM, where x_t = x0 + t n; got {type(schedule).__name__}")


@dataclasses.dataclass(kw_only=True)
class Consistency(Loss):
    """What training and distillation share.

    metric, c, perceptual: see `Distance`; rho: the grid's; pairs: n "uniform", or "lognormal" with weight
    P(p_mean + p_std z in [ln t_n, ln t_{n+1}]); weighting: lambda "uniform", or "gap", 1 / (t - r).
    """

    metric: str = "l2"
    c: float = 0.00054
    rho: float = 7.0
    pairs: str = "uniform"
    p_mean: float = -1.1
    p_std: float = 2.0
    weighting: str = "uniform"
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    family: ClassVar[str] = "consistency"

    def __post_init__(self):
        needs_edm_path(self.schedule)
        if self.prediction.kind != "consistency":
            raise ValueError(
                f"prediction: {self.prediction.kind!r} does not hold f(x, sigma_min) = x; use Prediction('consistency')"
            )
        one_of("pairs", self.pairs, ("uniform", "lognormal"))
        one_of("weighting", self.weighting, ("uniform", "gap"))
        above("rho", self.rho, 0)
        above("p_std", self.p_std, 0)
        self.distance = Distance(self.metric, self.c, self.perceptual)
        self.target: nn.Module | None = None

    def levels(self, progress: float) -> int:
        """N, the grid's number of levels."""
        raise NotImplementedError

    def decay(self, progress: float) -> float:
        """mu of the target network, target <- mu target + (1 - mu) network; 0: the network itself."""
        raise NotImplementedError

    def pair_images(self, batch: Batch, t: np.ndarray, r: np.ndarray) -> tuple[Tensor, Tensor]:
        """x_t and x_r."""
        raise NotImplementedError

    def __call__(self, network, batch):
        t, r = self.pair(batch)
        x_t, x_r = self.pair_images(batch, t, r)
        f = Denoiser(network, self.schedule, self.prediction)
        f_target = f if self.target is None else Denoiser(self.target, self.schedule, self.prediction)
        with same_dropout(x_t), torch.no_grad():
            y = f_target(x_r, r, batch.labels)
        weight = spread(1 / (t - r) if self.weighting == "gap" else np.ones_like(t), x_t)
        return weight * self.distance(f(x_t, t, batch.labels), y)

    def grid(self, progress: float) -> np.ndarray:
        """t_1 ... t_N, its ends exact."""
        grid = karras(self.schedule.t_min, self.schedule.t_max, self.levels(progress), self.rho)
        grid[0], grid[-1] = self.schedule.t_min, self.schedule.t_max
        return grid

    def pair(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """t = t_{n+1} and r = t_n, float64 [B]."""
        grid = self.grid(batch.progress)
        if self.pairs == "uniform":
            share = np.ones(len(grid) - 1)
        else:
            share = np.diff([math.erf(v) for v in (np.log(grid) - self.p_mean) / (math.sqrt(2) * self.p_std)])
        if not share.sum() > 0:
            raise ValueError(f"p_mean, p_std: {self.p_mean}, {self.p_std} leave no pair on the grid any chance")
        cumulative = np.cumsum(share) / share.sum()
        n = np.minimum(np.searchsorted(cumulative, uniforms(batch.seeds), side="right"), len(share) - 1)
        return grid[n + 1], grid[n]

    def start(self, network):
        if self.decay(0.0) > 0:
            self.target = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def after_step(self, network, progress):
        if self.target is not None:
            kept: list[Tensor] = list(self.target.parameters())
            torch._foreach_lerp_(kept, list(network.parameters()), 1 - self.decay(progress))
            for old, new in zip(self.target.buffers(), network.buffers(), strict=True):
                old.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.target is None else {"target": self.target.state_dict()}

    def load_state_dict(self, state):
        if self.target is not None:
            self.target.load_state_dict(state["target"])


@dataclasses.dataclass(kw_only=True)
class ConsistencyTraining(Consistency):
    """CT from scratch: the grid grows to s1 + 1 levels as the training goes on, along curriculum "cm" (Song et al.) from s0
    levels, along "ict" from s0 + 1 by doubling the gaps; "constant" has s1 + 1 throughout. mu0: the target's decay at the
    start, 0 for no target network."""

    curriculum: str = "cm"
    s0: int = 2
    s1: int = 150
    mu0: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        one_of("curriculum", self.curriculum, ("cm", "ict", "constant"))
        if not 2 <= self.s0 <= self.s1:
            raise ValueError(f"s0, s1: {self.s0}, {self.s1}; the grid grows and has a pair where 2 <= s0 <= s1")
        if not 0 <= self.mu0 < 1:
            raise ValueError(f"mu0: {self.mu0} is out of range; use 0 (no target network) up to, not including, 1")

    def levels(self, progress):
        if self.curriculum == "constant":
            return self.s1 + 1
        law = curricula.cm_levels if self.curriculum == "cm" else curricula.ict_levels
        return law(progress, self.s0, self.s1)

    def decay(self, progress):
        return curricula.cm_decay(self.levels(progress), self.s0, self.mu0) if self.mu0 else 0.0

    def pair_images(self, batch, t, r):
        x_t, x_r = linear_forms(batch, (np.ones_like(t), t), (np.ones_like(r), r))
        return x_t, x_r


@dataclasses.dataclass(kw_only=True)
class ImprovedConsistencyTraining(ConsistencyTraining):
    """iCT: no target network, pseudo-Huber distance, lognormal pairs, weight 1 / (t - r), 10 to 1280 gaps."""

    metric: str = "huber"
    pairs: str = "lognormal"
    weighting: str = "gap"
    curriculum: str = "ict"
    s0: int = 10
    s1: int = 1280
    mu0: float = 0.0


@dataclasses.dataclass(kw_only=True)
class ConsistencyDistillation(Consistency):
    """CD from a diffusion model: N levels; solver "heun" or "euler", one step of it; mu: the target's decay, 0 for CIFAR-10
    and 0.95 for ImageNet in the paper. The teacher may know another path: it is asked at the same noise level."""

    teacher: Denoiser
    N: int = 18
    solver: str = "heun"
    mu: float = 0.0

    needs_teacher: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        one_of("solver", self.solver, ("heun", "euler"))
        above("N", self.N, 2, equal=True)
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu: {self.mu} is out of range; use 0 (no target network) up to, not including, 1")
        known, asked = float(self.teacher.schedule.ratio(self.teacher.schedule.t_max)), self.schedule.t_max
        if known < asked * (1 - 1e-6):
            raise ValueError(
                f"teacher: it knows noise up to {known:.4g} times the image, the student starts at {asked:.4g}; give the "
                f"student the schedule EDM(sigma_max={known:.4g}), or another teacher"
            )

    def levels(self, progress):
        return self.N

    def decay(self, progress):
        return self.mu

    def pair_images(self, batch, t, r):
        (x_t,) = linear_forms(batch, (np.ones_like(t), t))
        return x_t, self.ode_step(x_t, t, r, batch.labels)

    @torch.no_grad()
    def ode_step(self, x: Tensor, t: np.ndarray, r: np.ndarray, labels: Tensor | None) -> Tensor:
        """From t to r along dx/dt = (x - D) / t: Heun's step, or Euler's."""

        def slope(x: Tensor, t: np.ndarray) -> Tensor:
            return (x - self.ask_teacher(x, t, labels)) / column(t, x)

        gap = column(r - t, x)
        first = slope(x, t)
        if self.solver == "euler":
            return x + gap * first
        return x + 0.5 * gap * (first + slope(x + gap * first, r))

    def ask_teacher(self, x: Tensor, sigma: np.ndarray, labels: Tensor | None) -> Tensor:
        """The teacher's D at x = x0 + sigma n: its own path has alpha(t) x at the t of that noise level."""
        t = self.teacher.schedule.time_of(sigma)
        return self.teacher(column(self.teacher.schedule.alpha(t), x) * x, t, labels)

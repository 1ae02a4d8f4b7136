"""Score SDE (Song et al. 2021): E_t lambda(t) ||s(x_t, t) - grad log p(x_t | x0)||^2 over the continuous VP, sub-VP, VE.

weighting "score": lambda = sigma^2. "likelihood": lambda = g^2, whose expectation bounds the negative log-likelihood; its
variance is tamed by drawing t with density proportional to g^2 / sigma^2 (Song, Durkan, Murray, Ermon 2021). Since
d ln(sigma / alpha)^2 = g^2 / sigma^2 dt on every path, that is ln(sigma / alpha) uniform, and nothing has to be inverted.
"""

import dataclasses
import math

import numpy as np

from fastdiff.schedules import VE, VP
from fastdiff.training.losses.base import Regression, one_of, uniform_times, uniforms


@dataclasses.dataclass(kw_only=True)
class SDELoss(Regression):
    """t is uniform in the SDE's own time; with `importance` it has the likelihood's density, the expectation is the same."""

    weighting: str = "score"
    importance: bool = False

    def __post_init__(self):
        one_of("weighting", self.weighting, ("score", "likelihood"))
        if not isinstance(self.schedule, (VP, VE)):
            raise ValueError(f"schedule: the score SDE loss needs VP, SubVP or VE, got {type(self.schedule).__name__}")
        if self.importance and self.weighting != "likelihood":
            raise ValueError("importance: it draws t for weighting='likelihood'; give that too, or leave importance out")

    def times(self, batch):
        schedule = self.schedule
        if self.importance:
            low, high = np.log(schedule.ratio(np.array([schedule.t_min, schedule.t_max])))
            return schedule.time_of(np.exp(low + uniforms(batch.seeds) * (high - low)))
        if isinstance(schedule, VE):
            return schedule.level(uniforms(batch.seeds))
        return uniform_times(schedule, batch)

    def weight(self, t):
        return self.noise_gain(t) * self._law(t)

    def _law(self, t: np.ndarray) -> np.ndarray:
        """lambda / sigma^2, over the density of t relative to the uniform one."""
        if self.weighting == "score":
            return np.ones_like(t)
        if not self.importance:
            return self.schedule.drift_diffusion(t)[1] / self.schedule.sigma(t) ** 2
        s = self.schedule
        length = 1.0 if isinstance(s, VE) else s.t_max - s.t_min
        return np.full_like(t, 2 * math.log(float(s.ratio(s.t_max) / s.ratio(s.t_min))) / length)

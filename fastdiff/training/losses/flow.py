"""Flow matching (Lipman et al. 2023, Liu et al. 2023): E ||u(x_t, t) - (n - x0)||^2 on x_t = (1 - t) x0 + t n."""

import dataclasses

import numpy as np

from fastdiff.schedules import Flow
from fastdiff.training.losses.base import Regression, normals, one_of, uniform_times


@dataclasses.dataclass(kw_only=True)
class FlowLoss(Regression):
    """law: t "uniform", or "logit_normal" with logit t ~ N(mean, std^2) (Esser et al. 2024).

    Whatever F is, the error that counts is that of the velocity u = (x - D) / t.
    """

    law: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        one_of("law", self.law, ("uniform", "logit_normal"))
        if not isinstance(self.schedule, Flow):
            raise ValueError(f"schedule: flow matching needs the path Flow, got {type(self.schedule).__name__}")

    def times(self, batch):
        if self.law == "uniform":
            return uniform_times(self.schedule, batch)
        t = 1 / (1 + np.exp(-(self.mean + self.std * normals(batch.seeds))))
        return np.clip(t, self.schedule.t_min, self.schedule.t_max)

    def weight(self, t):
        return self.image_gain(t) / t**2

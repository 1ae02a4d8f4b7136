"""EDM's loss (Karras et al. 2022, table 1): ln sigma ~ N(p_mean, p_std^2), weight (sigma^2 + sd^2) / (sigma sd)^2 on
||D - x0||^2, which is weight 1 on EDM's own ||F - F*||^2."""

import dataclasses

import numpy as np

from fastdiff.training.losses.base import Regression, normals


@dataclasses.dataclass(kw_only=True)
class EDMLoss(Regression):
    """sigma is the schedule's ratio, so that every path sees the same noise levels."""

    p_mean: float = -1.2
    p_std: float = 1.2

    def times(self, batch):
        return self.schedule.time_of(np.exp(self.p_mean + self.p_std * normals(batch.seeds)))

    def weight(self, t):
        r, sd = self.schedule.ratio(t), self.prediction.sigma_data
        return (r**2 + sd**2) / (r * sd) ** 2 * self.image_gain(t)

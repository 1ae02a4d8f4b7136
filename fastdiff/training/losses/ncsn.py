"""Denoising score matching over noise levels (Vincent 2011; NCSN, Song and Ermon 2019):

L = 1/N sum_i lambda(sigma_i) E ||s(x + sigma_i n, sigma_i) + n / sigma_i||^2,   lambda = sigma^2
"""

import dataclasses

import numpy as np

from fastdiff.training.losses.base import Batch, Regression, above, uniforms


def level_times(schedule, batch: Batch, levels: int) -> np.ndarray:
    """t [B], uniform over `levels` noise levels in geometric progression from the schedule's first to its last."""
    ratios = np.geomspace(schedule.ratio(schedule.t_min), schedule.ratio(schedule.t_max), levels)
    return schedule.time_of(ratios[np.minimum((uniforms(batch.seeds) * levels).astype(int), levels - 1)])


@dataclasses.dataclass(kw_only=True)
class NCSNLoss(Regression):
    """levels: their number, 10 in the paper's NCSN, 232 in its second version, 1000 with the score SDE's networks."""

    levels: int = 10

    def __post_init__(self):
        above("levels", self.levels, 1, equal=True)

    def times(self, batch):
        return level_times(self.schedule, batch, self.levels)

    def weight(self, t):
        return self.noise_gain(t)

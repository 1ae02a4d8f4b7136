"""DDPM's simple loss: E ||F - F*||^2 at t uniform over the steps (Ho et al. 2020, equation 14), for eps, x0 or v.

Min-SNR weights the error of the image by min(SNR, gamma) (Hang et al. 2023): min(SNR, gamma) / SNR on eps,
min(SNR, gamma) / (SNR + 1) on v.
"""

import dataclasses

import numpy as np

from fastdiff.training.losses.base import Regression, above, uniform_times


@dataclasses.dataclass(kw_only=True)
class DDPMLoss(Regression):
    """Discrete schedules draw t from {0 ... T-1}, continuous ones from [t_min, t_max]."""

    def times(self, batch):
        return uniform_times(self.schedule, batch)


@dataclasses.dataclass(kw_only=True)
class MinSNRLoss(DDPMLoss):
    """gamma: the signal-to-noise ratio beyond which an image's weight does not grow."""

    gamma: float = 5.0

    def __post_init__(self):
        above("gamma", self.gamma, 0)

    def weight(self, t):
        return np.minimum(np.exp(self.schedule.log_snr(t)), self.gamma) * self.image_gain(t)

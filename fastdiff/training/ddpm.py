"""DDPM's simple loss: E ||F - F*||^2 at t uniform over the steps (Ho et al. 2020, equation 14), for eps, x0 or v."""

import numpy as np

from fastdiff.training.losses import regression, uniforms


def loss(network, config, batch):
    """[B] losses; discrete schedules draw t from {0 ... T-1}, continuous ones from [t_min, t_max]."""
    schedule, u = config.schedule, uniforms(batch.seeds)
    if schedule.name == "ddpm":
        t = np.minimum(np.floor(u * schedule.T), schedule.T - 1)
    else:
        t = schedule.t_min + u * (schedule.t_max - schedule.t_min)
    return regression(network, schedule, config.prediction, batch, t)

"""EDM's loss (Karras et al. 2022, table 1): ln sigma ~ N(p_mean, p_std^2), weight (sigma^2 + sd^2) / (sigma sd)^2 on
||D - x0||^2, which is weight 1 on ||F - F*||^2."""

import numpy as np

from fastdiff.training.losses import normals, regression


def loss(network, config, batch):
    """[B] losses."""
    t = config.schedule.time_of(np.exp(config.p_mean + config.p_std * normals(batch.seeds)))
    return regression(network, config.schedule, config.prediction, batch, t)

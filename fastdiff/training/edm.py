"""EDM's loss (Karras et al. 2022, table 1): ln sigma ~ N(P_mean, P_std^2), weight (sigma^2 + sd^2) / (sigma sd)^2 on
||D - x0||^2, which is weight 1 on ||F - F*||^2."""

import numpy as np

from fastdiff.training.losses import normals, regression

P_MEAN, P_STD = -1.2, 1.2


def loss(network, config, batch):
    """[B] losses."""
    t = config.schedule.time_of(np.exp(P_MEAN + P_STD * normals(batch.seeds)))
    return regression(network, config.schedule, config.prediction, batch, t)

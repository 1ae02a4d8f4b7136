"""Easy consistency tuning (Geng et al. 2024): the diffusion loss with its target moved from x0 to D at a nearby r < t.

    ln t ~ N(P_mean, P_std^2),   r = max(0, t (1 - n(t) / q^(stage+1))),   n(t) = 1 + k sigmoid(-b t)
    L = (sqrt(||D(x_t, t) - sg D(x_r, r)||^2 + c^2) - c) / (t - r),   D(x_0, 0) = x0

x_t and x_r share their noise, both evaluations the dropout mask. As the stages go on r approaches t.
"""

import numpy as np
import torch

from fastdiff.denoiser import Denoiser
from fastdiff.training.losses import linear_forms, normals

P_MEAN, P_STD = -1.1, 2.0
K_SIGMOID, B_SIGMOID = 8.0, 1.0


def earlier_time(t: np.ndarray, q: float, stage: int) -> np.ndarray:
    """r(t), 0 where the gap would reach past 0."""
    n = 1 + K_SIGMOID / (1 + np.exp(B_SIGMOID * t))
    return np.maximum(0.0, t * (1 - n / q ** (stage + 1)))


def loss(network, config, batch):
    """[B] losses."""
    schedule, prediction = config.schedule, config.prediction
    t = np.clip(np.exp(P_MEAN + P_STD * normals(batch.seeds)), 1e-4, schedule.sigma_max)
    r = earlier_time(t, config.q, min(int(batch.progress * config.stages), config.stages - 1))
    denoise = Denoiser(network, schedule, prediction)
    x_t, x_r = linear_forms(batch, (np.ones_like(t), t), (np.ones_like(r), r))

    # The fork gives the generators back as they were, so that both evaluations drop the same units.
    with torch.random.fork_rng([x_t.device] if x_t.is_cuda else []), torch.no_grad():
        d_r = denoise(x_r, np.maximum(r, 1e-4), batch.labels)
    d_t = denoise(x_t, t, batch.labels)
    zero = torch.from_numpy(r == 0).to(x_t.device).reshape(-1, 1, 1, 1)
    target = torch.where(zero, batch.x0, d_r)
    # Per pixel, so that the learning rate does not depend on the resolution.
    squared = (d_t - target).square().flatten(1).sum(1) + config.huber**2
    distance = (squared + 1e-12).sqrt() - config.huber
    return distance / torch.from_numpy(t - r).to(distance) / batch.x0[0].numel() ** 0.5

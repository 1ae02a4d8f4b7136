"""What the losses share: fused noising and per-sample random numbers that depend on the sample's seed alone."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.denoiser import Prediction
from fastdiff.schedules import Schedule


@dataclasses.dataclass
class Batch:
    """One training batch: x0 [B, C, H, W] in [-1, 1], int64 seeds [B], labels [B] or None, progress in [0, 1)."""

    x0: Tensor
    seeds: Tensor
    labels: Tensor | None
    progress: float


def normals(seeds: Tensor, draw: int = 0) -> np.ndarray:
    """One standard normal per sample, float64 [B] on the host."""
    z = ops.philox_normal(seeds, draw, (1,), domain=ops.Domain.AUGMENT)
    return z[:, 0].double().cpu().numpy()


def uniforms(seeds: Tensor, draw: int = 0) -> np.ndarray:
    """One uniform in (0, 1) per sample, float64 [B]: Phi of the normal."""
    return np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in normals(seeds, draw)])


def linear_forms(batch: Batch, *pairs: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """[len(pairs), B, C, H, W]: a x0 + b n for each pair of float64 [B] arrays, all with the same noise, in one pass."""
    table = np.stack([np.stack(np.broadcast_arrays(a, b), -1) for a, b in pairs], 1)
    return ops.add_noise(batch.x0, batch.seeds, torch.from_numpy(table).to(batch.x0.device, torch.float32))


def run(network: Callable, x: Tensor, c_noise: np.ndarray, labels: Tensor | None) -> Tensor:
    """The network at c_noise [B]; its output in float32."""
    c = torch.from_numpy(c_noise).to(x.device, torch.float32)
    return network(x, c, *([] if labels is None else [labels])).float()


def regression(network: Callable, schedule: Schedule, prediction: Prediction, batch: Batch, t: np.ndarray) -> Tensor:
    """mean over pixels of (F - F*)^2 at times t [B], per sample: [B].

    F* is linear in (x0, n), so the network's input and its target are two forms of one fused pass.
    """
    c, (b_x0, b_n) = prediction.coefficients(schedule, t), prediction.target(schedule, t)
    net_in, target = linear_forms(batch, (c.c_in * schedule.alpha(t), c.c_in * schedule.sigma(t)), (b_x0, b_n))
    return (run(network, net_in, c.c_noise, batch.labels) - target).square().flatten(1).mean(1)

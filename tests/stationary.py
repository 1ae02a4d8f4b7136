"""Whether a loss is at its optimum: a network that is right, directions in which it may go wrong, and their gradients."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff import Prediction
from fastdiff.schedules import Schedule

BY_CHANCE = 4.5  # standard errors: one gradient in 150,000


class Probe:
    """F of an exact D(x, t), plus theta_k phi_k(x, t): phi = 1, y, tanh 2y, ln(sigma / alpha) y / 2, y being x at unit size.

    theta is [B, 4], one row per sample, so that one backward pass gives every sample's own gradient.
    """

    def __init__(self, exact: Callable[[Tensor, np.ndarray], Tensor], schedule: Schedule, prediction: Prediction, B: int):
        self.exact, self.schedule, self.prediction = exact, schedule, prediction
        self.theta = torch.zeros(B, 4, requires_grad=True)
        self.t = np.empty(0)

    def time(self, c_noise: Tensor) -> np.ndarray:
        """t from c_noise, whichever prediction wrote it; on a grid of times, the nearest one."""
        c, kind = c_noise.double().numpy(), self.prediction.kind
        if kind in ("edm", "consistency"):
            return self.schedule.time_of(np.exp(4 * c))
        return np.exp(c) if kind == "ve" else c

    def __call__(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.t = self.time(c_noise)
        c = self.prediction.coefficients(self.schedule, self.t)
        a, s = self.schedule.alpha(self.t), self.schedule.sigma(self.t)
        c_in, skip, out, size, log_ratio = (
            torch.from_numpy(np.asarray(v)).reshape(-1, 1, 1, 1)
            for v in (c.c_in, c.c_skip, c.c_out, np.sqrt(a**2 / 4 + s**2), np.log(s / a))
        )
        # (D - c_skip x) / c_out; at c_out = 0, where a consistency function is x whatever F is, nothing
        raw = x.double() / c_in
        f = torch.where(out == 0, 0.0, (self.exact(raw, self.t) - skip * raw) / torch.where(out == 0, 1.0, out))
        y = raw / size
        basis = torch.stack((torch.ones_like(y), y, torch.tanh(2 * y), 0.5 * log_ratio * y), 1)
        wrong = self.theta.reshape(*self.theta.shape, 1, 1, 1) * basis
        return f.float() + wrong.sum(1).float()


def z_scores(losses: Tensor, theta: Tensor, keep: np.ndarray | None = None) -> np.ndarray:
    """Mean gradient of the losses [B] by theta [B, K], in standard errors, [K]."""
    (gradient,) = torch.autograd.grad(losses.sum(), theta)
    g = gradient.double().numpy()[slice(None) if keep is None else keep]
    return g.mean(0) / (g.std(0) / np.sqrt(len(g)) + 1e-300)


def check_stationary(loss: Callable[..., Tensor], probe: Probe, batch, size: float = 0.1, seen: float = 8.0) -> None:
    """At theta = 0 no gradient but by chance; off by `size` along one direction, a gradient leads back, not by chance."""
    z = z_scores(loss(probe, batch), probe.theta)
    assert np.abs(z).max() <= BY_CHANCE, z
    for k in range(4):
        with torch.no_grad():
            probe.theta.zero_()
            probe.theta[:, k] = size
        z = z_scores(loss(probe, batch), probe.theta)
        assert z[k] >= seen, (k, z)
    with torch.no_grad():
        probe.theta.zero_()

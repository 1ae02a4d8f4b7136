"""Shared by the sampler tests: data whose denoiser is closed form, networks made of it, and plans replayed by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mixture import Mixture

from fastdiff import ops
from fastdiff.plan import Plan


class Oracle:
    """The network of one plan that makes D exact, whatever the plan's prediction; counts its calls.

    It takes its time from the plan in float64, so that rounding of c_noise is no part of the comparison, and checks that
    the c_noise it is given is that time's.
    """

    def __init__(self, plan: Plan, data: Mixture):
        self.plan, self.data, self.calls = plan, data, 0

    def __call__(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        t, schedule, p = self.plan.times[self.calls], self.plan.schedule, self.plan.prediction
        self.calls += 1
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        sd, edm = p.sigma_data, p.kind == "edm"
        expected = np.log(s / a) / 4 if edm and not p.raw else t * (1 if p.raw else p.time_scale)
        np.testing.assert_allclose(c_noise.numpy(), expected, rtol=1e-6, atol=1e-6)
        # EDM's c_in of x / alpha; the other predictions see x itself
        c_in = 1 / np.sqrt(s**2 + (a * sd) ** 2) if edm and not p.raw else 1.0
        x = x.double() / c_in
        d = self.data.denoise(x, a, s)
        if edm:
            r = s / a
            skip, out = sd**2 / (r**2 + sd**2), r * sd / np.sqrt(r**2 + sd**2)
            return ((d - skip * x / a) / out).float()
        return {"eps": (x - a * d) / s, "x0": d, "v": (a * x - d) / s, "score": -(x - a * d) / s**2}[p.kind].float()


def replay(
    plan: Plan,
    data: Mixture,
    x: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    V: float = 0.0,
    override: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, x: x,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The rows of the plan carried out by hand, in float64, from unit noise x, with noise(draw) as its draws.

    V is what the network says of its variance, the same everywhere. override(i, x) may replace the state after row i.
    dtype: float32 for what plain arithmetic in it loses.
    """
    schedule, history, saved = plan.schedule, {}, None
    x = x.to(dtype) * plan.prior_std
    for i, row in enumerate(plan.rows):
        if row.langevin is not None:
            x = override(i, corrected(plan, row, data, x, noise(next(iter(row.noise))).to(dtype)))
            continue
        new = row.x * x
        if row.evaluate:
            a, s = float(schedule.alpha(row.t)), float(schedule.sigma(row.t))
            d = data.denoise(x, a, s)
            d = (x - a * d) / s if row.estimate == "eps" else d
            new = new + row.d * d + row.d_clip * d.clamp(-1, 1)
        if row.saved:
            new = new + row.saved * saved
        for slot, h in row.history.items():
            new = new + h * history[slot]
        for k, (draw, amount) in enumerate(row.noise.items()):
            if k == 0 and row.learned is not None:
                low, high = row.learned
                amount += math.exp(((1 + V) * high + (1 - V) * low) / 4)
            new = new + amount * noise(draw).to(dtype)
        if row.save_x:
            saved = x
        if row.save_d is not None:
            history[row.save_d] = d.clamp(-1, 1) if row.save_clipped else d
        x = override(i, new)
    return x


def corrected(plan, row, data, x, z):
    """x + eps score + sqrt(2 eps) z, eps = 2 a snr^2 ||z||^2 / ||score||^2, norms of each sample or averaged."""
    alpha, sigma = float(plan.schedule.alpha(row.t)), float(plan.schedule.sigma(row.t))
    score = (alpha * data.denoise(x, alpha, sigma) - x) / sigma**2
    norms = [v.flatten(1).norm(dim=1) for v in (z, score)]
    of_z, of_score = norms if plan.norms == 0 else [n.mean() for n in norms]
    eps = (row.langevin * (of_z / of_score) ** 2).reshape(-1, 1, 1, 1)
    return x + eps * score + (2 * eps).sqrt() * z


def philox(seeds: torch.Tensor, shape: tuple[int, ...]) -> Callable[[int], torch.Tensor]:
    """noise(draw): what a plan's rows add for these seeds."""
    return lambda draw: ops.philox_normal(seeds, draw, shape, domain=ops.Domain.STEP)


@pytest.fixture
def make_mixture():
    return Mixture


@pytest.fixture
def make_oracle():
    return Oracle


@pytest.fixture(name="replay")
def replay_fixture():
    return replay


@pytest.fixture(name="philox")
def philox_fixture():
    return philox

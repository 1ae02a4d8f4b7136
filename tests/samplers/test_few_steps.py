"""Fewer steps of a chain, and few-step models: each rule against its formula or an exhaustive search."""

import itertools
import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import Prediction, ops, samplers
from fastdiff.samplers.analytic import variance_times
from fastdiff.schedules import DDPM, EDM, TrigFlow

T, EPS = DDPM(), Prediction("eps", raw=True)
MU, STD = 0.3, 0.25


def gamma_of(t):
    """E eps^2 of Gaussian data: eps = sigma (x - alpha mu) / (alpha^2 std^2 + sigma^2)."""
    a, s = T.alpha(t), T.sigma(t)
    return s**2 / (a**2 * STD**2 + s**2)


@pytest.mark.parametrize("per_step", [True, False])
def test_analytic_variance_is_exact(per_step):
    """On Gaussian data the optimal variance is Var(x_s | x_t) = var_s - (alpha_t / alpha_s)^2 var_s^2 / var_t."""
    t = np.round(np.linspace(0, 999, 10))[::-1]
    gamma = gamma_of(np.arange(1000)) if per_step else gamma_of(t)
    plan = samplers.analytic_ddpm(T, EPS, 10, gamma=gamma, last_pixel=None, clip=False)
    assert plan.times == t.tolist()
    for row, now, then in zip(plan.rows[:-1], t[:-1], t[1:], strict=True):
        var = {u: float(T.alpha(u) ** 2 * STD**2 + T.sigma(u) ** 2) for u in (now, then)}
        share = float(T.alpha(now) / T.alpha(then)) ** 2
        exact = var[then] - share * var[then] ** 2 / var[now]
        assert next(iter(row.noise.values())) ** 2 == pytest.approx(exact, rel=1e-9)
    assert not plan.rows[-1].noise


def test_analytic_moments(make_mixture, replay):
    """With it 10 steps already give the exact deviation, which DDPM's two fixed variances miss by more than 5 %."""
    data = make_mixture((1.0,), (MU,), (STD,), per_pixel=True)
    x = torch.zeros(12, 1, 1, 1, dtype=torch.float64)
    x[1] = 1.0

    def std(plan):
        draws = sorted({d for row in plan.rows for d in row.noise})

        def noise(draw):
            z = torch.zeros_like(x)
            z[2 + draws.index(draw)] = 1.0
            return z

        out = replay(plan, data, x, noise).flatten()
        return (out[1:] - out[0]).square().sum().sqrt().item()

    gamma = gamma_of(np.arange(1000))
    # what is left is the last step, from t = 0 to D: std^2 / sqrt(std^2 + r^2)
    end = STD / math.sqrt(STD**2 + float(T.ratio(0)) ** 2)
    best = std(samplers.analytic_ddpm(T, EPS, 10, gamma=gamma, last_pixel=None, clip=False))
    assert best / STD == pytest.approx(end, rel=1e-4)
    assert abs(std(samplers.ddpm(T, EPS, 10, variance="large", clip=False)) / STD - 1) > 0.05
    assert abs(std(samplers.ddpm(T, EPS, 10, variance="small", clip=False)) / STD - 1) > 0.05
    # eta = 0 is DDIM's mean with the variance that DDIM lacks
    ddim = samplers.ddim(T, EPS, 10, spacing="linspace")
    plan = samplers.analytic_ddpm(T, EPS, 10, gamma=gamma, eta=0.0, clip=False)
    assert [r.x for r in plan.rows] == pytest.approx([r.x for r in ddim.rows], rel=1e-9)
    # the last noise is at most two grey levels' worth
    assert plan.rows[-2].noise[8] <= 2 * 2 / 255 * math.sqrt(math.pi / 2)


def test_estimate_gamma():
    """Monte Carlo over images against the closed form; a model keeps it and `sample` finds it there."""

    def net(x, t):
        a, s = float(T.alpha(float(t[0]))), float(T.sigma(float(t[0])))
        return s * (x - a * MU) / (a**2 * STD**2 + s**2)

    model = fastdiff.wrap(net, schedule=T, prediction="eps", shape=(3, 16, 16))
    seeds = ops.seed_tensor(range(64))
    images = MU + STD * ops.philox_normal(ops.seed_tensor(range(100, 164)), 0, (3, 16, 16))
    times = [0.0, 50.0, 400.0, 999.0]
    got = samplers.estimate_gamma(model.denoiser, images, times, seeds)
    # the mean of n squares is off by sqrt(2 / n); n = 49,152 pixels, shared images
    np.testing.assert_allclose(got, gamma_of(np.array(times)), rtol=5 * math.sqrt(2 / images.numel()))
    with pytest.raises(ValueError, match="gamma: Analytic-DPM needs Gamma of the model"):
        fastdiff.sample(model, 10, seeds=[0], sampler="analytic-ddpm")
    model.info["gamma"] = gamma_of(np.arange(1000)).tolist()
    x = fastdiff.sample(model, 10, seeds=range(16), sampler="analytic-ddpm", clip=False, last_pixel=None, clip_output=False)
    assert x.mean().item() == pytest.approx(MU, abs=4 * STD / math.sqrt(x.numel()) + 0.002)
    assert x.std().item() == pytest.approx(STD, rel=0.02)


def test_fast_ddpm():
    """STEP is DDIM on the chain's steps; VAR has betas of its own whose chain ends where the long one does."""
    step = samplers.fast_ddpm(T, EPS, 10, method="step", spacing="quadratic", kappa=0.5)
    ddim = samplers.ddim(T, EPS, 10, spacing="quadratic", eta=0.5)
    assert step.rows == ddim.rows
    for spacing, power in (("uniform", 1), ("quadratic", 2)):
        t = variance_times(T, 10, spacing)[::-1]
        assert t[-1] == pytest.approx(999) and t[0] == pytest.approx(0, abs=1e-6)
        abar = T.alpha(t) ** 2
        betas = 1 - abar / np.append(1.0, abar[:-1])
        assert np.ptp(np.diff(betas ** (1 / power))) <= 1e-6, "betas or their roots are even"
    assert samplers.fast_ddpm(T, EPS, 10).times == pytest.approx(variance_times(T, 10, "uniform").tolist())


def test_fast_ddpm_times_follow_the_gamma_function():
    """Kong and Ping's map: with linear betas prod (1 - beta_i) = c^t Gamma(b + 1) / Gamma(b - t + 1), to 0.01 of a step."""
    step = (T.beta_end - T.beta_start) / (T.T - 1)
    b = (1 - T.beta_start) / step
    for t in variance_times(T, 10, "uniform"):
        level = 2 * math.log(float(T.alpha(t)))
        low, high = 0.0, 1000.0
        for _ in range(100):
            u = (low + high) / 2
            value = u * math.log(step) + math.lgamma(b + 1) - math.lgamma(b - u + 1)
            low, high = (u, high) if value > level else (low, u)
        assert u - 1 == pytest.approx(t, abs=0.01)  # theirs counts from 1


def test_best_steps_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 8):
        cost = rng.random((8, 8))
        got = samplers.best_steps(cost, n)
        ways = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), n - 2)]
        total = [sum(cost[s, t] for s, t in itertools.pairwise(way)) for way in ways]
        assert tuple(got) == ways[int(np.argmin(total))] and len(got) == n


def test_watson_bound():
    """On Gaussian data the chosen steps' bound is below that of even and of quadratic ones; its KL terms are closed form."""
    short = DDPM(T=60, beta_start=1e-3, beta_end=0.2)
    k = np.arange(60)
    r = short.ratio(k)
    mse = STD**2 * r**2 / (STD**2 + r**2)
    plan = samplers.watson(short, EPS, 6, mse=mse)
    snr = 1 / r**2

    def bound(times):
        t = np.array(times[::-1], int)
        return sum(0.5 * (snr[a] - snr[b]) * mse[b] for a, b in itertools.pairwise(t))

    assert plan.times[0] == 59 and plan.times[-1] == 0 and plan.nfe == 6
    best = bound(plan.times)
    rng = np.random.default_rng(1)
    for _ in range(200):
        other = [59, *sorted(rng.choice(np.arange(1, 59), 4, replace=False), reverse=True), 0]
        assert best <= bound(other) + 1e-12
    # the term is KL(q(x_s | x_t, x0) || p): difference of the means squared over twice the small variance
    a, b = int(plan.times[-2]), int(plan.times[-3])
    added = short.sigma(b) ** 2 - (short.alpha(b) / short.alpha(a)) ** 2 * short.sigma(a) ** 2
    on_d = short.alpha(a) * added / short.sigma(b) ** 2
    small = added * short.sigma(a) ** 2 / short.sigma(b) ** 2
    assert on_d**2 * mse[b] / (2 * small) == pytest.approx(0.5 * (snr[a] - snr[b]) * mse[b], rel=1e-9)


def test_progressive_distillation():
    """DDIM between i / N, the last D the image; a student that knows the map lands on it in any number of steps."""
    cosine = TrigFlow(sigma_data=1.0, sigma_min=math.exp(-10), sigma_max=math.exp(10))
    plan = samplers.progressive(cosine, EPS, 4)
    assert cosine.t_max + cosine.t_min == pytest.approx(math.pi / 2)  # log-SNR from 20 to -20
    u = [(t - cosine.t_min) / (cosine.t_max - cosine.t_min) for t in plan.times]
    assert u == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert plan.rows == samplers.ddim(cosine, EPS, 4, times=plan.times, clip=True).rows


def test_scm_two_steps(make_mixture, replay, philox):
    """Lu and Song's two steps: D at t_max, then cos(t) D + sin(t) sigma_d z at t = 1.1, and D there."""
    plan = samplers.consistency(TrigFlow(), Prediction("x0", raw=True), 2)
    assert plan.times == [pytest.approx(math.atan(160)), 1.1]
    data, seeds = make_mixture(), ops.seed_tensor([1, 2])
    z, start = philox(seeds, (3, 5, 7)), ops.philox_normal(seeds, 0, (3, 5, 7)).double()
    t = plan.times[0]
    d = data.denoise(0.5 * math.sin(t) * start, math.cos(t), 0.5 * math.sin(t))
    d = data.denoise(math.cos(1.1) * d + 0.5 * math.sin(1.1) * z(0).double(), math.cos(1.1), 0.5 * math.sin(1.1))
    assert (replay(plan, data, start, z) - d).abs().max() <= 1e-12


def test_search_times():
    """It finds the best of the levels it may choose from; a model then samples there."""
    schedule, tried = EDM(), []
    target = np.log([80.0, 3.0, 0.4])

    def score(times):
        tried.append(times)
        assert times[0] == 80.0 and all(a > b for a, b in itertools.pairwise(times))
        return float(np.square(np.log(times) - target).sum())

    found = samplers.search_times(score, schedule, 3)
    levels = fastdiff.schedules.karras(80.0, 0.002, 24)
    assert found == pytest.approx([80.0, *(float(levels[np.abs(np.log(levels) - v).argmin()]) for v in target[1:])])
    assert len(tried) <= 3 * 2 * 24
    model = fastdiff.wrap(lambda x, t: x, schedule=schedule, prediction="x0", shape=(1, 2, 2), family="consistency")
    model.times[3] = found
    assert fastdiff.make_plan(model, 3).times == found
    with pytest.raises(ValueError, match="levels: 4 are too few to choose 5 times from"):
        samplers.search_times(score, schedule, 5, levels=4)

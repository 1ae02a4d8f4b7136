"""Every sampler against exact answers: Gaussian data, a mixture's weights, and the measured order of convergence."""

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.plan import execute
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, SubVP

MU, STD = 0.3, 0.25
SHAPE, SEEDS = (3, 16, 16), range(16)  # 12,288 independent pixels
N = 16 * 3 * 16 * 16


def wrapped(schedule, data, kind="eps", family="diffusion"):
    """The data's exact network behind `fastdiff.wrap`: a plain net(x, t), which knows nothing of plans."""

    def net(x, t):
        a, s = float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0])))
        d = data.denoise(x.double(), a, s)
        out = {"eps": (x.double() - a * d) / s, "x0": d, "v": (a * x.double() - s**2 * d - a**2 * d) / s}
        return out[kind].float()

    return fastdiff.wrap(net, schedule=schedule, prediction=kind, shape=SHAPE, family=family)


# sampler, schedule, what the network predicts, order, options
RUNS = {
    "ddpm-large": ("ddpm", DDPM(), "eps", 1, {"clip": False}),
    "ddpm-small": ("ddpm", DDPM(), "v", 1, {"variance": "small", "clip": False}),
    "ddim": ("ddim", DDPM(), "eps", 1, {}),
    "ddim-eta1": ("ddim", DDPM(), "eps", 1, {"eta": 1.0}),
    "ddim-vp": ("ddim", VP(), "v", 1, {}),
    "euler": ("euler", EDM(), "x0", 1, {}),
    "euler-churn": ("euler", EDM(), "x0", 1, {"S_churn": 20.0, "S_max": 50.0}),
    "euler-flow": ("euler", Flow(), "eps", 1, {}),
    "heun": ("heun", EDM(), "eps", 2, {}),
    "heun-vp": ("heun", VP(), "eps", 2, {}),
    "heun-churn": ("heun", EDM(), "eps", 2, {"S_churn": 20.0, "S_max": 50.0}),
    "em-vp": ("euler-maruyama", VP(), "eps", 1, {}),
    "em-subvp": ("euler-maruyama", SubVP(), "eps", 1, {}),
    "em-ve": ("euler-maruyama", VE(), "eps", 1, {}),
    # Order 0: below 1000 steps their last one is longer than t_min, and its error, 1 %, does not fall with the others'.
    "reverse-diffusion-vp": ("reverse-diffusion", VP(), "eps", 0, {}),
    "reverse-diffusion-ve": ("reverse-diffusion", VE(), "eps", 1, {}),
    "reverse-diffusion-subvp": ("reverse-diffusion", SubVP(), "eps", 1, {}),
    "ancestral-vp": ("ancestral", VP(), "eps", 0, {}),
    "ancestral-ve": ("ancestral", VE(), "eps", 1, {}),
    "euler-ancestral": ("euler-ancestral", EDM(), "x0", 1, {}),
    "euler-ancestral-vp": ("euler-ancestral", VP(), "x0", 1, {"eta": 0.7}),
    "dpm2-ancestral": ("dpm2-ancestral", EDM(), "x0", 1, {}),
    "2s-ancestral": ("dpm-solver++2s-ancestral", VP(), "x0", 1, {}),
    "dpm-sde": ("dpm-solver++sde", EDM(), "x0", 1, {}),
    "sde-1m": ("sde-dpm-solver++2m", EDM(), "x0", 1, {"solver": "taylor", "lower_order_final": False}),
    "sde-2m": ("sde-dpm-solver++2m", VP(), "x0", 1, {}),
    "sde-3m": ("sde-dpm-solver++3m", EDM(), "x0", 1, {}),
    "restart": ("restart", EDM(), "eps", 2, {"intervals": ((0.06, 0.2, 20, 1),)}),
    "unipc": ("unipc", EDM(), "eps", 2, {}),
    "deis": ("deis", EDM(), "eps", 2, {}),
}
TWO = {"heun", "dpm2-ancestral", "dpm-solver++2s-ancestral", "dpm-solver++sde", "restart"}  # evaluations in a step


def moments(plan, data, replay):
    """Exact mean and deviation of what a plan makes of N(mu, std^2) data.

    D is affine there, so the image is affine in the start and in every draw: one replay of a batch of unit inputs gives
    the gain of each, and the variance is the sum of their squares.
    """
    draws = sorted({draw for row in plan.rows for draw in row.noise})
    x = torch.zeros(len(draws) + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1.0

    def noise(draw):
        z = torch.zeros_like(x)
        z[2 + draws.index(draw)] = 1.0
        return z

    out = replay(plan, data, x, noise).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


@pytest.mark.parametrize("name", RUNS)
def test_gaussian_moments(name, make_mixture, replay):
    """The plan's mean and deviation tend to the data's, 0.3 and 0.25, and the error falls with the sampler's order."""
    sampler, schedule, kind, order, options = RUNS[name]
    data = make_mixture((1.0,), (MU,), (STD,), per_pixel=True)
    errors = []
    for steps in (100, 200):
        nfe = 2 * steps - 1 if sampler in TWO else steps
        plan = samplers.SAMPLERS[sampler](schedule, fastdiff.Prediction(kind, raw=True), nfe, **options)
        mean, std = moments(plan, data, replay)
        # The start has mean 0 where the marginal has alpha mu; the ODE shrinks that by std / ratio.
        assert abs(mean - MU) <= 2 * MU * STD / float(schedule.ratio(plan.times[0])) + 0.2 / steps * (
            sampler in ("euler-maruyama", "reverse-diffusion", "ancestral")
        )
        errors.append(abs(std / STD - 1))
    # A pure power would give 1/2 or 1/4; higher terms move that, and 5e-4 is the start's and the last step's own error.
    assert errors[1] <= {0: math.inf, 1: 0.62, 2: 0.3}[order] * errors[0] + 5e-4, errors
    assert errors[1] <= {0: 0.01, 1: 0.07, 2: 0.01}[order], errors


@pytest.mark.parametrize("name", RUNS)
def test_gaussian_samples(name, make_mixture, replay):
    """Drawn through `sample`: mean and deviation of n pixels within 4 standard errors of the plan's exact moments."""
    sampler, schedule, kind, _, options = RUNS[name]
    data, nfe = make_mixture((1.0,), (MU,), (STD,), per_pixel=True), 51
    model = wrapped(schedule, data, kind)
    plan = fastdiff.make_plan(model, nfe, sampler, **options)
    mean, std = moments(plan, data, replay)
    x = fastdiff.sample(model, nfe, seeds=SEEDS, sampler=sampler, clip_output=False, progress=False, **options).double()
    assert abs(x.mean() - mean) <= 4 * std / math.sqrt(N)
    assert abs(x.std() / std - 1) <= 4 / math.sqrt(2 * N)


@pytest.mark.parametrize(
    "name", ["ddpm-large", "ddim-eta1", "heun", "heun-churn", "em-vp", "dpm-sde", "sde-3m", "restart", "unipc"]
)
def test_mixture_weights(name, make_mixture):
    """Each pixel its own mixture of modes 10 deviations apart: the share of the first mode is its weight."""
    data = make_mixture((0.7, 0.3), (0.5, -0.5), (0.1, 0.1), per_pixel=True)
    sampler, schedule, _, _, options = RUNS[name]
    x = fastdiff.sample(wrapped(schedule, data), 101, seeds=range(8), sampler=sampler, progress=False, **options)
    share = (x > 0).double().mean().item()
    assert abs(share - 0.7) <= 4 * math.sqrt(0.7 * 0.3 / x.numel()) + 0.005  # 0.005: the samplers' bias at this nfe


def test_consistency_exact(make_mixture):
    """The exact consistency function of a Gaussian: every number of evaluations gives N(mu, std^2)."""
    schedule = EDM()

    def jump(x, t):  # along the probability-flow ODE from t to 0: deviations from the mean shrink by std / sqrt(std^2 + t^2)
        return MU + (x - MU) * STD / math.sqrt(STD**2 + float(t[0]) ** 2)

    model = fastdiff.wrap(jump, schedule=schedule, prediction="x0", shape=SHAPE, family="consistency")
    for nfe in (1, 2, 4):
        x = fastdiff.sample(model, nfe, seeds=SEEDS, clip_output=False, progress=False).double()
        # The prior has mean 0 where the exact marginal at t = 80 has mean mu.
        first = MU * STD / 80
        assert abs(x.mean() - MU) <= 4 * STD / math.sqrt(N) + first
        assert abs(x.std() / STD - 1) <= 4 / math.sqrt(2 * N)


def ends_at(sampler, schedule, nfe, data, **options):
    """Largest distance, relative to the data's deviation, from the exact answer: the ODE's solution at the last level,
    then D there, since every plan ends with D.
    """
    plan = samplers.SAMPLERS[sampler](schedule, fastdiff.Prediction("x0", raw=True), nfe, **options)
    model = wrapped(schedule, data, "x0")
    z = torch.linspace(-2, 2, 60).reshape(1, 3, 4, 5)
    with torch.inference_mode():
        got = execute(plan, model.network, fastdiff.ops.seed_tensor([0]), (*SHAPE[:1], 4, 5), x_T=z).double()
    levels = [float(schedule.ratio(t)) for t in (plan.times[0], plan.times[-1])]
    y = z.double() * plan.prior_std / float(schedule.alpha(plan.times[0]))
    flow = math.sqrt(STD**2 + levels[1] ** 2) / math.sqrt(STD**2 + levels[0] ** 2)
    y = MU + (y - MU) * flow
    truth = MU + STD**2 / (STD**2 + levels[1] ** 2) * (y - MU)
    return ((got - truth).abs().max() / STD).item()


@pytest.mark.parametrize(
    ("sampler", "order", "schedule", "steps", "options"),
    [
        ("euler", 1, EDM(), (64, 128, 256), {}),
        ("euler", 1, VP(), (64, 128, 256), {}),
        ("ddim", 1, DDPM(), (50, 100, 200), {"spacing": "linspace"}),
        ("heun", 2, EDM(), (32, 64, 128), {}),
        ("heun", 2, VP(), (32, 64, 128), {}),
        ("heun", 2, Flow(), (16, 32, 64), {"ratio_min": 0.02, "ratio_max": 50.0}),
    ],
)
def test_order(sampler, order, schedule, steps, options, make_mixture):
    """Halving the steps divides the error by 2^order; measured by regression, within 0.15.

    The coarsest grids lie where the leading term rules, the finest well above float32 rounding (about 1e-6).
    """
    data = make_mixture((1.0,), (MU,), (STD,), per_pixel=True)
    nfes = [2 * n - 1 if sampler == "heun" else n for n in steps]
    errors = [ends_at(sampler, schedule, nfe, data, **options) for nfe in nfes]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert min(errors) > 5e-6, "rounding, not the step, would be measured"
    assert abs(-slope - order) <= 0.15, (slope, errors)


@pytest.mark.parametrize(
    ("schedule", "options", "bias"),
    [
        (VP(), {"predictor": "reverse-diffusion"}, 0.02),
        (VP(), {"predictor": "euler-maruyama", "norms": "batch"}, 0.02),
        (SubVP(), {"predictor": "euler-maruyama"}, 0.03),
        (VE(), {"predictor": "ancestral"}, 0.02),
        (VE(), {"predictor": "reverse-diffusion", "snr": 0.1, "corrections": 2}, 0.02),
    ],
)
def test_predictor_corrector(schedule, options, bias, make_mixture, replay, philox):
    """Mean and deviation of the data; and the loop's Langevin steps are the formula's, written out in float64."""
    data = make_mixture((1.0,), (MU,), (STD,), per_pixel=True)
    model, nfe = wrapped(schedule, data), 360
    request = {"sampler": "predictor-corrector", "clip_output": False, "progress": False, **options}
    x = fastdiff.sample(model, nfe, seeds=SEEDS, **request).double()
    assert abs(x.mean() - MU) <= 4 * STD / math.sqrt(N) + bias * STD
    assert abs(x.std() / STD - 1) <= 4 / math.sqrt(2 * N) + bias
    short, seeds = 66, fastdiff.ops.seed_tensor([5, 6, 7])
    plan = fastdiff.make_plan(model, short, "predictor-corrector", **options)
    by_hand = replay(plan, data, fastdiff.ops.philox_normal(seeds, 0, SHAPE), philox(seeds, SHAPE))
    got = fastdiff.sample(model, short, seeds=[5, 6, 7], **request)
    # x starts at up to 50 in float32, and every step multiplies its rounding by at most one
    assert (got - by_hand).abs().max() <= 2e-5
    given = [z.double() for z in (philox(seeds, SHAPE)(k) for k in range(plan.draws))]
    start = fastdiff.ops.philox_normal(seeds, 0, SHAPE)
    exact = fastdiff.sample(model, short, noise=[start, *given], dtype=torch.float64, **request)
    assert (exact - by_hand).abs().max() <= 1e-5  # the network here answers in float32
    one = fastdiff.sample(model, short, seeds=[6], **request)
    assert ((one[0] - got[1]).abs().max() <= 1e-5) == (options.get("norms") != "batch")

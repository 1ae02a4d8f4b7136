"""Every sampler against exact answers: Gaussian data, a mixture's weights, and the measured order of convergence."""

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.plan import execute
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow

MU, STD = 0.3, 0.25
SHAPE, SEEDS = (3, 16, 16), range(32)  # 24,576 independent pixels
N = 32 * 3 * 16 * 16


def wrapped(schedule, data, kind="eps", family="diffusion"):
    """The data's exact network behind `fastdiff.wrap`: a plain net(x, t), which knows nothing of plans."""

    def net(x, t):
        a, s = float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0])))
        d = data.denoise(x.double(), a, s)
        out = {"eps": (x.double() - a * d) / s, "x0": d, "v": (a * x.double() - s**2 * d - a**2 * d) / s}
        return out[kind].float()

    return fastdiff.wrap(net, schedule=schedule, prediction=kind, shape=SHAPE, family=family)


# sampler, schedule, what the network predicts, nfe, options, bias of the standard deviation (relative) at that nfe.
# The biases are the samplers' own (first-order steps on this many evaluations), measured once with the float64 rows.
RUNS = {
    "ddpm-large": ("ddpm", DDPM(), "eps", 250, {}, 0.02),
    "ddpm-small": ("ddpm", DDPM(), "v", 500, {"variance": "small"}, 0.02),
    "ddim": ("ddim", DDPM(), "eps", 500, {}, 0.02),
    "ddim-eta1": ("ddim", DDPM(), "eps", 500, {"eta": 1.0}, 0.02),
    "ddim-vp": ("ddim", VP(), "v", 500, {}, 0.02),
    "euler": ("euler", EDM(), "x0", 500, {}, 0.02),
    "euler-flow": ("euler", Flow(), "eps", 500, {}, 0.02),
    "heun": ("heun", EDM(), "eps", 199, {}, 0.003),
    "heun-vp": ("heun", VP(), "eps", 199, {}, 0.003),
    "heun-churn": ("heun", EDM(), "eps", 99, {"S_churn": 20.0, "S_max": 50.0}, 0.01),
    "em-vp": ("euler-maruyama", VP(), "eps", 250, {}, 0.05),
    "em-ve": ("euler-maruyama", VE(), "eps", 250, {}, 0.05),
}


@pytest.mark.parametrize("name", RUNS)
def test_gaussian(name, make_mixture):
    """N(0.3, 0.25^2): mean and deviation within 4 standard errors of n pixels plus the stated bias."""
    sampler, schedule, kind, nfe, options, bias = RUNS[name]
    data = make_mixture((1.0,), (MU,), (STD,), per_pixel=True)
    x = fastdiff.sample(
        wrapped(schedule, data, kind), nfe, seeds=SEEDS, sampler=sampler, clip_output=False, progress=False, **options
    ).double()
    print(f"BIAS {name} mean {x.mean() - MU:+.5f} std {x.std() / STD - 1:+.5f}")
    assert abs(x.mean() - MU) <= 4 * STD / math.sqrt(N) + bias * MU
    assert abs(x.std() / STD - 1) <= 4 / math.sqrt(2 * N) + bias


@pytest.mark.parametrize("sampler", ["ddpm", "ddim-eta1", "heun", "heun-churn", "em-vp"])
def test_mixture_weights(sampler, make_mixture):
    """Each pixel its own two-mode mixture, modes 5 deviations apart: the share of the first mode is its weight."""
    data = make_mixture((0.7, 0.3), (0.5, -0.5), (0.1, 0.1), per_pixel=True)
    name, schedule, _, nfe, options, _ = RUNS[{"ddpm": "ddpm-large"}.get(sampler, sampler)]
    x = fastdiff.sample(wrapped(schedule, data), nfe, seeds=SEEDS, sampler=name, progress=False, **options)
    share = (x > 0).double().mean().item()
    print(f"WEIGHT {sampler} {share:.4f}")
    assert abs(share - 0.7) <= 4 * math.sqrt(0.7 * 0.3 / N) + 0.01  # 0.01: the samplers' bias at this nfe


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
        got = execute(plan, model.network, fastdiff.ops.seed_tensor([0]), SHAPE[:1] + (4, 5), x_T=z).double()
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

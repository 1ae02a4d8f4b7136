"""San-Roman's re-estimation: the chains are the paper's, each image follows its own, and a wrong start is made good."""

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import samplers
from fastdiff.samplers.analytic import short_chain
from fastdiff.schedules import DDPM, EDM, VP, SubVP

STD, SHAPE = 0.25, (1, 32, 32)
SEEDS = [3, 4, 5]


def gaussian(schedule):
    """N(0, STD^2) pixels; eps = sigma x / (alpha^2 STD^2 + sigma^2), at a time for each sample."""

    def net(x, t):
        a, s = (torch.from_numpy(f(t.double().numpy())).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        return (s * x.double() / (a**2 * STD**2 + s**2)).to(x.dtype)

    return fastdiff.wrap(net, schedule=schedule, prediction="eps", shape=SHAPE)


def level(x):
    """abar from the variance of a whole image: abar STD^2 + 1 - abar = mean x^2. Nearly exact on 1024 pixels."""
    return (1 - x.double().square().mean((1, 2, 3))) / (1 - STD**2)


@pytest.mark.parametrize("law", ["uniform", "quadratic", "fibonacci"])
@pytest.mark.parametrize("target", [math.log(4e-5), math.log(0.3), math.log(0.9999)])
def test_chains(law, target):
    """prod (1 - beta) is the estimate; the betas obey their law and begin with the chain's first, or all shrink."""
    for n in (1, 2, 3, 8):
        logs = short_chain(law, 1e-4, n, target)
        assert logs[-1] == pytest.approx(target, rel=1e-9)
        betas = -np.expm1(np.diff(logs, prepend=0.0))
        if n > 1 and target < math.log(0.9):
            assert betas[0] == pytest.approx(1e-4, rel=1e-9)
        if law == "fibonacci" and betas[-1] < 1 - 1e-9:
            np.testing.assert_allclose(betas[2:], betas[1:-1] + betas[:-2], rtol=1e-9, atol=1e-14)
        elif law != "fibonacci" and n > 2:
            steps = np.diff(np.sqrt(betas) if law == "quadratic" else betas)
            np.testing.assert_allclose(steps, steps[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("schedule", [DDPM(), VP()])
def test_by_hand(schedule, eta):
    """Each image by itself, in float64: estimate, solve for the betas left, one DDIM step to the next of them, and again."""
    model, nfe = gaussian(schedule), 5
    z = [torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(nfe)]
    z[0] *= torch.tensor([0.8, 1.0, 1.0]).reshape(-1, 1, 1, 1)
    request = {"sampler": "san-roman", "level": level, "eta": eta, "clip_output": False}
    got = fastdiff.sample(model, nfe, noise=z, dtype=torch.float64, batch_size=2, **request)
    low, high = (2 * math.log(float(schedule.alpha(t))) for t in (schedule.t_max, schedule.t_min))
    for k in range(3):
        x = z[0][k : k + 1] * float(schedule.sigma(schedule.t_max))
        for i in range(nfe):
            target = low if i == 0 else min(max(math.log(float(level(x))), low), high)
            logs = short_chain("uniform", 1e-4, nfe - i, target)[::-1]
            now, then = logs[0], logs[1] if len(logs) > 1 else 0.0
            a, s, a2, s2 = math.exp(now / 2), math.sqrt(-math.expm1(now)), math.exp(then / 2), math.sqrt(-math.expm1(then))
            t = float(schedule.time_of(s / a))
            eps = model.network(x, torch.tensor([t], dtype=torch.float64))
            std = eta * math.sqrt((s2 / s) ** 2 * (s**2 - (a / a2) ** 2 * s2**2))
            x = a2 * (x - s * eps) / a + math.sqrt(s2**2 - std**2) * eps
            x = x + std * z[i + 1][k : k + 1] if i < nfe - 1 else x
        assert (got[k] - x[0]).abs().max() <= 1e-9


def test_a_wrong_start_is_made_good():
    """Noise a fifth too small: DDIM carries that to the image, re-estimation does not. Closed form of DDIM's deviation."""
    schedule, nfe = DDPM(), 40
    model = gaussian(schedule)
    z = 0.8 * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    plain = fastdiff.sample(model, nfe, noise=[z], sampler="fast-ddpm", clip_output=False)
    got = fastdiff.sample(model, nfe, noise=[z], sampler="san-roman", level=level, clip_output=False)
    assert plain.std().item() / STD < 0.85
    # after one step the estimate is of the image as it is; DDIM's own error with 40 steps is below 0.05
    assert got.std().item() / STD == pytest.approx(1.0, abs=0.05)


def test_right_estimates_change_nothing():
    """Where the estimate is the chain's own level, the images are FastDPM's, whose chain it is."""
    schedule, nfe, calls = DDPM(), 6, []
    own = short_chain("uniform", 1e-4, nfe, 2 * math.log(float(schedule.alpha(999))))[::-1]

    def told(x):
        calls.append(len(x))
        return torch.full((len(x),), math.exp(own[len(calls)]), dtype=torch.float64)

    request = {"seeds": SEEDS, "clip_output": False}
    expected = fastdiff.sample(gaussian(schedule), nfe, sampler="fast-ddpm", **request)
    got = fastdiff.sample(gaussian(schedule), nfe, sampler="san-roman", level=told, **request)
    # the chains left begin with beta_0 and end at the same level, but are solved again: they are the same betas
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert calls == [3] * (nfe - 1)
    calls.clear()
    fastdiff.sample(gaussian(schedule), nfe, sampler="san-roman", level=told, every=3, **request)
    assert calls == [3], "before the fourth of six steps"
    alone = [
        fastdiff.sample(gaussian(schedule), nfe, sampler="san-roman", level=level, seeds=[s], clip_output=False)
        for s in SEEDS
    ]
    together = fastdiff.sample(gaussian(schedule), nfe, sampler="san-roman", level=level, **request)
    assert torch.equal(torch.cat(alone), together), "an image depends on its own estimates only"


def test_fitted_level():
    """A network trained on this data for a second reads the level from half of the chain's variance to all of it."""
    schedule = DDPM()
    generator = torch.Generator().manual_seed(0)
    images = STD * torch.randn(64, 1, 16, 16, generator=generator)
    before = torch.get_rng_state()
    network = samplers.fit_level(schedule, images, steps=300)
    assert torch.equal(torch.get_rng_state(), before)
    for t in (300.0, 600.0, 900.0):
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        fresh = STD * torch.randn(32, 1, 16, 16, generator=generator)
        with torch.no_grad():
            found = network(a * fresh + s * torch.randn(fresh.shape, generator=generator))
        assert found.shape == (32,) and ((found > 0) & (found < 1)).all()
        # the loss is the square of this; 32 images of 256 pixels tell it to 2 %, the rest is what training leaves
        assert abs(math.log(float((1 - found).mean()) / s**2)) < 0.15, t


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "level: None estimates no noise level; give a function x -> alpha"),
        ({"level": level, "law": "even"}, "law: 'even' is not known"),
        ({"level": level, "every": 0}, "every, eta: 0, 0.0"),
        ({"level": lambda x: torch.ones(1)}, "level: 1 estimates for 3 images; return one for each"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fastdiff.sample(gaussian(DDPM()), 4, seeds=SEEDS, sampler="san-roman", **options)


@pytest.mark.parametrize("schedule", [EDM(), SubVP()])
def test_paths_that_keep_no_variance(schedule):
    with pytest.raises(ValueError, match=f"chains keep the variance, {type(schedule).__name__} does not; use DDPM or VP"):
        samplers.san_roman(schedule, fastdiff.Prediction("eps"), 4, level=level)

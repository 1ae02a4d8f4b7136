"""sample() with given noise, in float64, guided, thresholded, from a start: each against the formula written out."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import Guide, ops
from fastdiff.samplers.adjust import dynamic_threshold, rescale
from fastdiff.schedules import DDPM, EDM, VP

SHAPE, SEEDS = (2, 3, 5), [4, 9, 2**63]
MU, STD = 0.3, 0.25


def gaussian(schedule, log=None, mu=MU, std=STD, labels=0):
    """N(mu, std^2) data as a wrapped x0 network; with labels, class c has the mean c / 10 and class 2, none, the mean mu."""

    def net(x, t, y=None):
        if log is not None:
            log.append((x.dtype, tuple(x.shape)))
        a, s = float(schedule.alpha(float(t[0]))), float(schedule.sigma(float(t[0])))
        mean = mu if y is None else torch.where(y == 2, mu, y / 10.0).to(x).reshape(-1, 1, 1, 1)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)

    model = fastdiff.wrap(net, schedule=schedule, prediction="x0", shape=SHAPE, labels=labels)
    model.info["null_label"] = 2
    return model


def drawn(plan, seeds=SEEDS):
    """The noise that the seeds stand for: [x_T, z_1, ...]."""
    s = ops.seed_tensor(seeds)
    steps = [ops.philox_normal(s, draw, SHAPE, domain=ops.Domain.STEP) for draw in range(plan.draws)]
    return [ops.philox_normal(s, 0, SHAPE), *steps]


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "dpm-solver++sde", "sde-dpm-solver++3m", "restart", "unipc"])
def test_given_noise_is_the_seeds_noise(sampler):
    """The seeds' own draws, given: the same images. Other draws: others."""
    schedule, nfe = (DDPM(), 12) if sampler == "ddpm" else (EDM(), 43 if sampler == "restart" else 15)
    options = {"S_churn": 20.0} if sampler == "heun" else {}
    model = gaussian(schedule)
    request = {"sampler": sampler, "clip_output": False, "batch_size": 2, **options}
    noise = drawn(fastdiff.make_plan(model, nfe, sampler, **options))
    own = fastdiff.sample(model, nfe, seeds=SEEDS, **request)
    given = fastdiff.sample(model, nfe, noise=noise, **request)
    # the rows' noise is added in another order: a rounding of x at its largest, which later steps shrink
    torch.testing.assert_close(given, own, rtol=0, atol=3e-6)
    other = fastdiff.sample(model, nfe, noise=[noise[0] + 0.1, *noise[1:]], **request)
    assert (other - own).abs().max() > 1e-5


@pytest.mark.parametrize("sampler", ["heun", "unipc", "deis", "ddim"])
def test_float64(sampler):
    """The network gets float64 and the result has its precision: against the plan by hand, 1e-12; float32 does not do so."""
    log, schedule = [], VP()
    model, nfe = gaussian(schedule, log), 9
    plan = fastdiff.make_plan(model, nfe, sampler)
    z = drawn(plan)[0].double()
    out = fastdiff.sample(model, nfe, noise=[z], sampler=sampler, dtype=torch.float64, clip_output=False)
    assert out.dtype == torch.float64 and {d for d, _ in log} == {torch.float64}
    x, history, saved = z * plan.prior_std, {}, None
    for row in plan.rows:
        a, s = float(schedule.alpha(row.t)), float(schedule.sigma(row.t))
        d = MU + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MU)
        d = (x - a * d) / s if row.estimate == "eps" else d
        new = row.x * x + row.d * d + sum(h * history[j] for j, h in row.history.items())
        new = new + row.saved * saved if row.saved else new
        saved = x if row.save_x else saved
        history = history if row.save_d is None else history | {row.save_d: d}
        x = new
    assert (out - x).abs().max() <= 1e-12
    low = fastdiff.sample(model, nfe, noise=[z], sampler=sampler, clip_output=False)
    assert low.dtype == torch.float32 and 1e-9 < (low - x).abs().max() <= 1e-5


def test_float64_network():
    """A Module's weights are converted in a copy; the model keeps its own."""
    model = gaussian(EDM())
    layer = torch.nn.Conv2d(2, 2, 1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, t):
            return self.layer(x).clamp(-1, 1)

    model = fastdiff.wrap(Net(), schedule=EDM(), prediction="x0", shape=SHAPE)
    assert fastdiff.sample(model, 3, seeds=[1], dtype=torch.float64).dtype == torch.float64
    assert layer.weight.dtype == torch.float32


def test_guidance_is_the_formula():
    """D_u + w (D - D_u) is D of a Gaussian whose mean is mu_u + w (mu_c - mu_u): guided images are that model's."""
    log = []
    model = gaussian(EDM(), log, labels=3)
    weights = [1.0, 2.5, 0.0]
    got = fastdiff.sample(model, 7, seeds=SEEDS, labels=1, guidance=Guide(weights), sampler="heun", clip_output=False)
    assert {shape[0] for _, shape in log} == {6}, "one doubled batch for each evaluation"
    for i, w in enumerate(weights):
        other = gaussian(EDM(), mu=MU + w * (0.1 - MU))
        expected = fastdiff.sample(other, 7, seeds=[SEEDS[i]], sampler="heun", clip_output=False)
        torch.testing.assert_close(got[i], expected[0], rtol=0, atol=2e-5)


def test_guidance_interval_and_autoguidance():
    """Outside the interval nothing changes; a weaker model takes the place of the label for none, in batches of its own."""
    log, weak = [], gaussian(EDM(), mu=0.6)
    model = gaussian(EDM(), log)
    plain = fastdiff.sample(model, 5, seeds=SEEDS, sampler="euler", clip_output=False)
    request = {"seeds": SEEDS, "sampler": "euler", "clip_output": False}
    never = fastdiff.sample(model, 5, guidance=Guide(3.0, weak, interval=(1000.0, 2000.0)), **request)
    assert torch.equal(never, plain)
    always = fastdiff.sample(model, 5, guidance=Guide(3.0, weak), **request)
    assert {shape[0] for _, shape in log} == {3}
    expected = fastdiff.sample(gaussian(EDM(), mu=0.6 + 3 * (MU - 0.6)), 5, **request)
    torch.testing.assert_close(always, expected, rtol=0, atol=2e-5)
    # only the last evaluation, at r = 0.002, lies inside: D moves by w - 1 times (D - D_u) there
    last = fastdiff.sample(model, 5, guidance=Guide(3.0, weak, interval=(0.0, 0.0021)), **request)
    shift = 2 * (MU - 0.6) * 0.002**2 / (STD**2 + 0.002**2)
    torch.testing.assert_close(last, plain + shift, rtol=0, atol=1e-6)


def test_dynamic_threshold_and_rescale():
    d = torch.tensor([[[[0.5, -3.0], [1.0, 2.0]]], [[[0.1, -0.2], [0.3, 0.4]]]])
    got = dynamic_threshold(d, 1.0)
    torch.testing.assert_close(got[0], d[0] / 3)
    torch.testing.assert_close(got[1], d[1])  # within [-1, 1]: unchanged
    wide, narrow = torch.randn(4, 3, 8, 8) * 3, torch.randn(4, 3, 8, 8)
    full = rescale(wide, narrow, 1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), narrow.std((1, 2, 3)))
    torch.testing.assert_close(rescale(wide, narrow, 0.25), 0.25 * full + 0.75 * wide)
    # in the loop: one evaluation from EDM's start returns the adjusted D itself
    model = gaussian(EDM(), mu=2.0, std=1.0)
    plain = fastdiff.sample(model, 1, seeds=SEEDS, sampler="euler", clip_output=False)
    got = fastdiff.sample(model, 1, seeds=SEEDS, sampler="euler", clip_output=False, threshold=0.9)
    torch.testing.assert_close(got, dynamic_threshold(plain, 0.9), rtol=0, atol=1e-5)
    model, weak = gaussian(EDM()), gaussian(EDM(), std=0.6)
    guided = fastdiff.sample(model, 1, seeds=SEEDS, sampler="euler", clip_output=False, guidance=Guide(3.0, weak))
    got = fastdiff.sample(model, 1, seeds=SEEDS, sampler="euler", clip_output=False, guidance=Guide(3.0, weak, rescale=0.7))
    plain = fastdiff.sample(model, 1, seeds=SEEDS, sampler="euler", clip_output=False)
    torch.testing.assert_close(got, rescale(guided, plain, 0.7), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sampler", "schedule", "t"), [("heun", EDM(), 0.5), ("ddim", VP(), 0.4), ("ddpm", DDPM(), 300)])
def test_start(sampler, schedule, t):
    """SDEdit, CCDF: x0 noised to t and taken back. On Gaussian data each pixel's mean and deviation are known."""
    image = torch.full((2, 32, 32), -0.4)
    model = fastdiff.wrap(gaussian(schedule).network, schedule=schedule, prediction="x0", shape=image.shape)
    options = {"clip": False} if sampler == "ddpm" else {}
    out = fastdiff.sample(
        model, 41, seeds=range(16), sampler=sampler, start=image, t_start=t, clip_output=False, **options
    ).double()
    plan = fastdiff.make_plan(model, 41, sampler, t_start=t, **options)
    assert plan.rows[0].t == pytest.approx(t, rel=1e-9, abs=20 * (sampler == "ddpm")) and plan.times[0] <= t * (1 + 1e-9)
    # affine in the start: the ODE's gain from r = sigma / alpha to 0 is std / sqrt(std^2 + r^2), ancestral's its square
    r = float(schedule.ratio(plan.rows[0].t))
    gain = STD / math.sqrt(STD**2 + r**2)
    gain = gain**2 if sampler == "ddpm" else gain
    assert out.mean().item() == pytest.approx(MU + gain * (-0.4 - MU), abs=0.02)
    spread = STD if sampler == "ddpm" else gain * r
    spread = math.sqrt(STD**2 - gain**2 * STD**2) if sampler == "ddpm" else spread
    assert out.std().item() == pytest.approx(spread, rel=0.05)


def test_trajectory_and_callback():
    """The state after each row, the last one the image; a callback sees the same and changes nothing."""
    model, seen = gaussian(EDM()), []
    plain = fastdiff.run(model, 5, seeds=SEEDS, clip_output=False)
    result = fastdiff.run(
        model,
        5,
        seeds=SEEDS,
        clip_output=False,
        trajectory=True,
        batch_size=2,
        callback=lambda i, x: seen.append((i, x.clone())),
    )
    rows = len(result.plan.rows)
    assert result.trajectory.shape == (rows, 3, *SHAPE) and plain.trajectory is None
    torch.testing.assert_close(result.trajectory[-1], plain.images, rtol=0, atol=1e-6)
    assert [i for i, _ in seen] == [*range(rows), *range(rows)] and torch.equal(seen[0][1], result.trajectory[0, :2])


def test_where_the_network_fails():
    """With a callback the loop looks at every row: it names the row, the time and how many pixels."""

    def net(x, t):
        return x / 0 if float(t[0]) < 1 else x

    model = fastdiff.wrap(net, schedule=EDM(), prediction="x0", shape=(1, 2, 2))
    with pytest.raises(FloatingPointError, match=r"4 of 4 pixels .100.0%. are NaN or infinite after row 2 of 2, t = 0\.002"):
        fastdiff.sample(model, 2, seeds=[0], sampler="euler", callback=lambda i, x: None)


def test_learned_variance():
    """V = -1 gives the small variance, V = 1 the large one; a network without V is refused."""
    schedule = DDPM()

    def net(v):
        def double(x, t):
            return torch.cat((gaussian(schedule).network(x, t), torch.full_like(x, v)), 1)

        return fastdiff.wrap(double, schedule=schedule, prediction="x0", shape=SHAPE)

    plain = gaussian(schedule)
    for v, variance in ((-1.0, "small"), (1.0, "large")):
        learned = fastdiff.sample(net(v), 20, seeds=SEEDS, sampler="ddpm", variance="learned")
        fixed = fastdiff.sample(plain, 20, seeds=SEEDS, sampler="ddpm", variance=variance)
        torch.testing.assert_close(learned, fixed, rtol=0, atol=2e-6)
        # variance in the output, not asked for: left alone
        other = fastdiff.sample(net(v), 20, seeds=SEEDS, sampler="ddpm", variance="small")
        assert torch.equal(other, fastdiff.sample(plain, 20, seeds=SEEDS, sampler="ddpm", variance="small"))
    # a model that says it learns variances is sampled so by default
    model = net(0.3)
    model.prediction = dataclasses.replace(model.prediction, learned_variance=True)
    request = {"seeds": SEEDS, "sampler": "ddpm"}
    assert torch.equal(fastdiff.sample(model, 20, **request), fastdiff.sample(net(0.3), 20, variance="learned", **request))
    noise = drawn(fastdiff.make_plan(plain, 20, "ddpm"))
    request = {"sampler": "ddpm", "variance": "learned"}
    own, given = fastdiff.sample(net(0.3), 20, seeds=SEEDS, **request), fastdiff.sample(net(0.3), 20, noise=noise, **request)
    torch.testing.assert_close(given, own, rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match="variance: the network returns 2 channels and no variance, which takes 4"):
        fastdiff.sample(plain, 20, seeds=[0], sampler="ddpm", variance="learned")
    assert np.isfinite(own.numpy()).all()

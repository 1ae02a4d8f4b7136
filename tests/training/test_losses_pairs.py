"""Consistency losses: which pairs of times they take, how far apart two images are, and whose image is the target."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny

from fastdiff import Prediction, UNet, ops, schedules
from fastdiff.denoiser import Denoiser
from fastdiff.training import losses
from fastdiff.training.losses import Batch, curricula
from fastdiff.training.losses.distances import Distance

EDM = schedules.EDM()
TEACHER = Denoiser(lambda x, t: 0.1 * x, EDM, Prediction("x0"))


def create(name="ct", teacher=None, perceptual=None, **options):
    kind = "edm" if name == "ect" else "consistency"
    return losses.create(name, EDM, Prediction(kind), options, teacher=teacher, perceptual=perceptual)


def batch(n, shape=(1, 4, 4)):
    torch.manual_seed(1)
    return Batch(torch.rand(n, *shape) * 2 - 1, ops.seed_tensor(range(n)))


def test_curricula():
    """N(k), mu(k) of the papers at chosen progress; the grid's ends are exact and it grows."""
    assert [curricula.cm_levels(p, 2, 150) for p in (0.0, 0.25, 1 - 1e-9)] == [2, math.ceil(math.sqrt(5703.25) - 1) + 1, 151]
    assert curricula.cm_decay(2, 2, 0.9) == pytest.approx(0.9) and curricula.cm_decay(151, 2, 0.9) == pytest.approx(
        0.9986, abs=1e-4
    )
    doubled = [curricula.ict_levels(p / 8, 10, 1280) for p in range(8)]
    assert doubled == [11, 21, 41, 81, 161, 321, 641, 1281] and curricula.ict_levels(0.999, 10, 1280) == 1281
    assert curricula.ict_levels(0.124, 10, 1280) == 11 and curricula.ict_levels(0.99, 10, 160) == 161
    for name, progress in (("ct", 0.0), ("ct", 0.7), ("ict", 0.3)):
        grid = create(name).grid(progress)
        assert grid[0] == 0.002 and grid[-1] == 80.0 and np.all(np.diff(grid) > 0)
        np.testing.assert_allclose(grid, np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), len(grid)) ** 7, rtol=1e-12)


def test_pairs():
    """Neighbours on the grid, uniform or with the lognormal's share of each interval."""
    n = 20_000
    b = Batch(torch.zeros(n, 1, 1, 1), ops.seed_tensor(range(n)), None, 0.0)
    for options in ({}, {"pairs": "lognormal"}):
        loss = create(curriculum="constant", s1=8, **options)
        grid = loss.grid(0.0)
        t, r = loss.pair(b)
        i = np.searchsorted(grid, r)
        assert np.array_equal(grid[i], r) and np.array_equal(grid[i + 1], t)
        share = np.ones(8)
        if options:
            cdf = [0.5 * math.erfc(-(math.log(v) + 1.1) / 2 / math.sqrt(2)) for v in grid]
            share = np.diff(cdf)
        share = share / share.sum()
        counts = np.bincount(i, minlength=8)
        assert np.all(np.abs(counts - n * share) <= 4.5 * np.sqrt(n * share * (1 - share)) + 1)


def test_weighting_and_perceptual_metric():
    """Weight "gap" divides by t - r; a perceptual metric is the given one, with the student's image first."""
    b = batch(50)
    net = lambda x, c: torch.tanh(x)  # noqa: E731
    plain, gap = (create(weighting=w, curriculum="constant", s1=5)(net, b) for w in ("uniform", "gap"))
    t, r = create(curriculum="constant", s1=5).pair(b)
    torch.testing.assert_close(gap, plain / torch.from_numpy(t - r).float(), rtol=1e-5, atol=0)
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def perceptual(a, b):
        seen.append((a.requires_grad, b.requires_grad))
        return (a - b).square().flatten(1).mean(1)

    got = create(metric="classifier", perceptual=perceptual, curriculum="constant", s1=5)(
        lambda x, c: weight * torch.tanh(x), b
    )
    torch.testing.assert_close(got.detach(), plain)
    assert seen == [(True, False)]


def test_distances():
    a, b = torch.tensor([[[[1.0, 4.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]], [[[0.0, 0.0]]]])
    assert Distance("l1")(a, b).tolist() == [1.5, 0.0]
    assert Distance("l2")(a, b).tolist() == [2.5, 0.0]
    assert Distance("huber", 0.5)(a, b).tolist() == pytest.approx([math.sqrt(2.75) - 0.5, 0.0])
    # iCT's c = 0.00054 sqrt(d) on the whole norm, over sqrt(d)
    d = 3072
    x = torch.randn(1, 3, 32, 32) * 1e-3
    whole = math.sqrt(float(x.double().square().sum()) + (0.00054 * math.sqrt(d)) ** 2) - 0.00054 * math.sqrt(d)
    assert Distance("huber")(x, torch.zeros_like(x)).item() == pytest.approx(whole / math.sqrt(d), rel=1e-4)
    z = torch.zeros(1, 1, 2, 2, requires_grad=True)
    for c in (0.0, 0.1):
        (gradient,) = torch.autograd.grad(Distance("huber", c)(z, torch.zeros(1, 1, 2, 2)).sum(), z)
        assert torch.equal(gradient, torch.zeros_like(z))


def test_target_network():
    """target <- mu target + (1 - mu) network after every step, mu by the curriculum; a resumed run has it again."""
    torch.manual_seed(0)
    network = UNet(tiny(dropout=0.3))
    loss = create(mu0=0.8)
    loss.start(network)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    loss.after_step(network, 0.01)
    mu = 0.8 ** (2 / curricula.cm_levels(0.01, 2, 150))
    for k, v in loss.target.state_dict().items():
        torch.testing.assert_close(v, mu * before[k] + (1 - mu) * (before[k] + 1), rtol=1e-5, atol=1e-6)
    again = create(mu0=0.8)
    again.start(UNet(tiny(dropout=0.3)))
    again.load_state_dict(loss.state_dict())
    b = batch(8, (1, 8, 8))
    torch.manual_seed(5)
    one = loss(network, b)
    torch.manual_seed(5)
    assert torch.equal(one, again(network, b))
    one.mean().backward()
    assert not any(p.grad is not None for p in loss.target.parameters())
    assert create(mu0=0.0).state_dict() == {}
    for name, options in (("ict", {}), ("cd", {"teacher": TEACHER})):
        plain = create(name, **options)
        plain.start(network)
        assert plain.target is None


def test_dropout_is_shared_and_the_target_is_not_differentiated():
    drop, masks, graph = torch.nn.Dropout(0.5), [], []
    weight = torch.ones(1, requires_grad=True)

    def net(x, c):
        masks.append(drop(torch.ones(50)))
        graph.append(torch.is_grad_enabled())
        return weight * x

    for loss in (create(), create("ict"), create("cd", TEACHER)):
        masks.clear(), graph.clear()
        loss(net, batch(4))
        assert len(masks) == 2 and torch.equal(*masks) and sorted(graph) == [False, True]


def test_bad_requests():
    with pytest.raises(ValueError, match=r"prediction: 'edm' does not hold f\(x, sigma_min\) = x"):
        losses.create("ct", EDM, Prediction("edm"))
    for name, kind in (("ct", "consistency"), ("ect", "edm")):
        with pytest.raises(ValueError, match=r"schedule: consistency losses need EDM, .* got VP"):
            losses.create(name, schedules.VP(), Prediction(kind))
    for options, says in (
        ({"metric": "l3"}, "metric: 'l3' is not known; use one of l1, l2, huber, lpips, classifier"),
        ({"metric": "lpips"}, r"metric: 'lpips' needs its network; give perceptual.load\('lpips'"),
        ({"c": -1.0}, "c: -1.0 is out of range"),
        ({"pairs": "log"}, "pairs: 'log' is not known"),
        ({"weighting": "snr"}, "weighting: 'snr' is not known"),
        ({"curriculum": "none"}, "curriculum: 'none' is not known"),
        ({"s0": 10, "s1": 5}, "s0, s1: 10, 5; the grid grows"),
        ({"mu0": 1.0}, "mu0: 1.0 is out of range"),
        ({"rho": 0.0}, "rho: 0.0 is out of range; use a number > 0"),
        ({"p_std": 0.0}, "p_std: 0.0 is out of range; use a number > 0"),
    ):
        with pytest.raises(ValueError, match=says):
            create(**options)
    for options, says in (
        ({"solver": "rk4"}, "solver: 'rk4' is not known; use one of heun, euler"),
        ({"N": 1}, "N: 1 is out of range; use a number >= 2"),
        ({"mu": -0.1}, "mu: -0.1 is out of range"),
    ):
        with pytest.raises(ValueError, match=says):
            create("cd", TEACHER, **options)
    with pytest.raises(ValueError, match=r"p_mean, p_std: -900.0, 1.0 leave no pair on the grid any chance"):
        create(pairs="lognormal", p_mean=-900.0, p_std=1.0)(lambda x, c: x, batch(2))
    with pytest.raises(ValueError, match=r"teacher: it knows noise up to 50 times the image, .*EDM\(sigma_max=50\)"):
        create("cd", Denoiser(lambda x, t: x, schedules.VE(), Prediction("x0")))
    for options, says in (({"q": 0.5}, "q: 0.5 would put r after t"), ({"stages": 0}, "stages: 0 is out of range")):
        with pytest.raises(ValueError, match=says):
            create("ect", **options)

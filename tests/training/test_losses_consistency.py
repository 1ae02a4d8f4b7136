"""Consistency losses on Gaussian data, where the discrete and the continuous consistency function are closed forms.

With x0 ~ N(m, s^2) every step of an ODE solver multiplies x - m by a factor, and so does the conditional mean that
consistency training regresses to. The product of the factors from sigma_min on is the optimum.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from mixture import Mixture
from stationary import Probe, check_stationary
from tiny import tiny

from fastdiff import Prediction, UNet, ops, schedules
from fastdiff.denoiser import Denoiser
from fastdiff.training import losses
from fastdiff.training.losses import Batch, curricula
from fastdiff.training.losses.distances import Distance
from fastdiff.training.losses.ect import earlier_time

M, S = 0.2, 0.4
DATA = Mixture((1.0,), (M,), (S,))
EDM = schedules.EDM()
B = 6000


def gaussian_denoiser(schedule=EDM):
    """The exact teacher on any path, as a Denoiser of a network that returns x0."""

    def network(x, t):
        t = t.double().numpy()
        a, s = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))
        return DATA.denoise(x, a, s)

    return Denoiser(network, schedule, Prediction("x0"))


def create(name="ct", teacher=None, perceptual=None, **options):
    kind = "edm" if name == "ect" else "consistency"
    return losses.create(name, EDM, Prediction(kind), options, teacher=teacher, perceptual=perceptual)


def batch(n=B, shape=(1, 4, 4), progress=0.0):
    return Batch(DATA.draw((n, *shape)), ops.seed_tensor(range(n)), None, progress)


def euler(t, r):
    """Factor of x - m in Euler's step from t to r with the exact denoiser, and in E[x0 + r n | x0 + t n]."""
    return r / t + (1 - r / t) * S**2 / (S**2 + t**2)


def heun(t, r):
    def slope(v):
        return v / (S**2 + v**2)  # (x - D) / v over x - m

    return 1 + 0.5 * (r - t) * (slope(t) + slope(r) * (1 + (r - t) * slope(t)))


def chain(grid, factor):
    """f's factor a_n at every level: a_1 = 1, a_{n+1} = a_n factor(t_{n+1}, t_n)."""
    return np.cumprod([1.0, *(factor(t, r) for r, t in itertools.pairwise(grid))])


def consistency_function(grid, factors):
    """f(x, t) = m + a_n (x - m) at the level n nearest to t."""

    def f(x, t):
        n = np.abs(np.log(np.asarray(t)[:, None] / grid)).argmin(1)
        return M + torch.from_numpy(factors[n]).reshape(-1, 1, 1, 1) * (x - M)

    return f


def probe(loss, f, n=B):
    return Probe(f, EDM, loss.prediction, n)


def ect_factor(t, stage, q=2.0):
    """D's factor at ECT's optimum: the product along t -> r(t) -> r(r(t)) ... 0."""
    a, now = np.ones_like(t), t
    while np.any(now > 1e-6):
        r = earlier_time(now, q, stage)
        a, now = np.where(now > 1e-6, a * euler(np.maximum(now, 1e-9), r), a), r
    return a


CT = {
    "l2": ("ct", {"curriculum": "constant", "s1": 6, "mu0": 0.0}),
    "l1": ("ct", {"curriculum": "constant", "s1": 6, "mu0": 0.0, "metric": "l1"}),
    "huber": ("ct", {"curriculum": "constant", "s1": 6, "mu0": 0.0, "metric": "huber", "c": 0.1}),
    "cm": ("ct", {"mu0": 0.0, "s0": 3}),
    "ict": ("ict", {"p_mean": -0.5, "p_std": 1.0}),
}


@pytest.mark.parametrize("case", CT)
def test_optimum_of_training(case):
    """CT regresses f(x_t, t) to the mean of f(x_r, r) given x_t: no gradient at the product of those means' factors."""
    name, options = CT[case]
    loss = create(name, **options)
    grid = loss.grid(0.0)
    check_stationary(loss, probe(loss, consistency_function(grid, chain(grid, euler))), batch())


@pytest.mark.parametrize("stage", [0, 1])
def test_optimum_of_ect(stage):
    """The same along t -> r(t) -> r(r(t)) ... 0, where D is the image."""
    loss = create("ect", stages=4)

    def f(x, t):
        return M + torch.from_numpy(ect_factor(np.array(t), stage)).reshape(-1, 1, 1, 1) * (x - M)

    check_stationary(loss, probe(loss, f), batch(progress=stage / 4))


def test_ect_tends_to_the_solution_of_the_ode():
    """Stage by stage its optimum nears s / sqrt(s^2 + t^2), which at r = 0 is the denoiser's s^2 / (s^2 + t^2)."""
    t = np.geomspace(0.05, 80, 30)
    exact = S / np.sqrt(S**2 + t**2)
    errors = [np.abs(ect_factor(t, stage) - exact).max() for stage in range(8)]
    assert np.all(np.diff(errors) < 0) and errors[7] < 0.06 * errors[0]
    np.testing.assert_allclose(ect_factor(t, 0, 1.0), S**2 / (S**2 + t**2))


@pytest.mark.parametrize("metric", ["l1", "l2", "huber"])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_optimum_of_distillation(solver, metric):
    """CD's loss is 0 at the product of the solver's factors, and what is off is led back."""
    loss = create("cd", gaussian_denoiser(), solver=solver, metric=metric)
    grid = loss.grid(0.0)
    network = probe(loss, consistency_function(grid, chain(grid, heun if solver == "heun" else euler)), 500)
    b = batch(500)
    # x / t goes through float32 at t up to 80
    assert loss(network, b).max() <= {"l1": 3e-5, "l2": 1e-9, "huber": 1e-5}[metric]
    with torch.no_grad():
        network.theta[:, 1] = 0.05
    wrong = loss(network, b).mean()
    assert wrong >= {"l1": 1e-3, "l2": 2e-6, "huber": 1e-3}[metric]
    (gradient,) = torch.autograd.grad(wrong, network.theta)
    assert gradient[:, 1].sum() > 0


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1)])
def test_distilled_function_is_the_solution_of_the_ode(solver, order):
    """As N grows CD's optimum tends to m + sqrt((s^2 + eps^2) / (s^2 + t^2)) (x - m) in the solver's order."""
    exact = math.sqrt((S**2 + 0.002**2) / (S**2 + 80**2))
    errors = []
    for N in (81, 161, 321):
        loss = create("cd", gaussian_denoiser(), solver=solver, N=N)
        x = torch.full((1, 1, 1, 1), M + 80.0, dtype=torch.float64)
        for t, r in zip(loss.grid(0.0)[:0:-1], loss.grid(0.0)[-2::-1], strict=True):
            x = loss.ode_step(x, np.array([t]), np.array([r]), None)
        errors.append(abs(float(x) - M - 80 * exact))
    assert errors[0] / errors[2] == pytest.approx(4.0**order, rel=0.25)


def test_teacher_of_another_path():
    """A teacher on VP, cosine DDPM or Flow is asked at the same noise level and takes the same step."""
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t, r = np.array([0.1, 1.0, 5.0]), np.array([0.05, 0.7, 3.0])
    expected = create("cd", gaussian_denoiser()).ode_step(x, t, r, None)
    for schedule in (schedules.VP(), schedules.Flow(), schedules.TrigFlow()):
        got = create("cd", gaussian_denoiser(schedule)).ode_step(x, t, r, None)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([1, 2, 3])
    seen = []
    teacher = Denoiser(lambda x, c, labels: seen.append(labels) or x, EDM, Prediction("x0"))
    create("cd", teacher).ode_step(x, t, r, labels)
    assert len(seen) == 2 and all(torch.equal(s, labels) for s in seen)


def test_boundary():
    """f(x, sigma_min) = x exactly, whatever the network says, from host times, grid times and device times."""
    torch.manual_seed(0)
    network = UNet(tiny())
    for p in network.parameters():
        p.data.normal_(0, 0.5)
    x = torch.randn(4, 1, 8, 8)
    for sigma_min in (0.002, 0.01):
        schedule = schedules.EDM(sigma_min)
        f = Denoiser(network, schedule, Prediction("consistency"))
        first = losses.create("ct", schedule, Prediction("consistency")).grid(0.9)[0]
        for t in (sigma_min, np.full(4, first), torch.tensor(sigma_min, dtype=torch.float64)):
            assert torch.equal(f(x, t), x)
        assert not torch.allclose(f(x, 1.0), x)


def test_pair_shares_its_noise():
    """CT's x_t and x_r hold one draw, bit for bit: on black images, at powers of two, they are multiples of it."""
    b = Batch(torch.zeros(4, 3, 5, 5), ops.seed_tensor([0, 7, 2**63, 2**64 - 1]))
    noise = ops.philox_normal(b.seeds, 0, (3, 5, 5), domain=ops.Domain.TRAINING)
    x_t, x_r = create().pair_images(b, np.array([64.0, 8, 2, 0.5]), np.array([32.0, 4, 0.25, 0.125]))
    for x, times in ((x_t, [64, 8, 2, 0.5]), (x_r, [32, 4, 0.25, 0.125])):
        assert torch.equal(x, noise * torch.tensor(times).reshape(-1, 1, 1, 1))
    # and with an image under it, each is what the op makes of that noise by itself
    b.x0 = torch.rand(4, 3, 5, 5)
    pair = create().pair_images(b, np.full(4, 3.7), np.full(4, 2.9))
    for x, time in zip(pair, (3.7, 2.9), strict=True):
        assert torch.equal(x, ops.add_noise(b.x0, b.seeds, torch.tensor([1.0, time]).expand(4, 1, 2))[0])


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
    for name, options in (("ict", {}), ("cd", {"teacher": gaussian_denoiser()})):
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

    for loss in (create(), create("ict"), create("cd", gaussian_denoiser())):
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
    ):
        with pytest.raises(ValueError, match=says):
            create(**options)
    for options, says in (
        ({"solver": "rk4"}, "solver: 'rk4' is not known; use one of heun, euler"),
        ({"N": 1}, "N: 1 levels have no pair"),
        ({"mu": -0.1}, "mu: -0.1 is out of range"),
    ):
        with pytest.raises(ValueError, match=says):
            create("cd", gaussian_denoiser(), **options)
    with pytest.raises(ValueError, match=r"teacher: it knows noise up to 50 times the image, .*EDM\(sigma_max=50\)"):
        create("cd", gaussian_denoiser(schedules.VE()))
    for options, says in (({"q": 0.5}, "q: 0.5 would put r after t"), ({"stages": 0}, "stages: 0 is out of range")):
        with pytest.raises(ValueError, match=says):
            create("ect", **options)

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
from fastdiff.training.losses import Batch
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

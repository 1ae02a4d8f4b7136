"""Improved DDPM: the bound against closed forms of Gaussian data, and the times that are drawn by their loss."""

import math

import numpy as np
import pytest
import torch
from mixture import Mixture
from stationary import BY_CHANCE, Probe, z_scores

from fastdiff import Prediction, ops, samplers, schedules
from fastdiff.training import losses
from fastdiff.training.losses import Batch
from fastdiff.training.losses.importance import KEPT, UNIFORM, ImportantTimes
from fastdiff.training.losses.improved_ddpm import _log_probability

B = 6000
SCHEDULE = schedules.DDPM(T=40, beta_end=0.3)
DATA = Mixture((1.0,), (0.1,), (0.4,))


def create(kind="eps", schedule=SCHEDULE, **options):
    return losses.create("iddpm", schedule, Prediction(kind, learned_variance=True), options)


def batch(n=B, shape=(1, 4, 4)):
    return Batch(DATA.draw((n, *shape)), ops.seed_tensor(range(n)))


def best_variance(schedule, t):
    """(log beta~, log beta, Var(x_{t-1} | x_t)): beta~ + A^2 Var(x0 | x_t) of the Gaussian data, t >= 1."""
    beta, abar = schedule.betas, np.cumprod(1 - schedule.betas)
    small = beta[t] * (1 - abar[t - 1]) / (1 - abar[t])
    a = beta[t] * np.sqrt(abar[t - 1]) / (1 - abar[t])
    return np.log(small), np.log(beta[t]), small + a**2 * 0.16 * (1 - abar[t]) / (abar[t] * 0.16 + 1 - abar[t])


class Learned(Probe):
    """The exact F, and the exact place of the log-variance; theta moves the one, gamma the other."""

    def __init__(self, schedule, prediction, n=B):
        def exact(x, t):
            a, s = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))
            return DATA.denoise(x, a, s)

        super().__init__(exact, schedule, prediction, n)
        self.gamma = torch.zeros(n, 3, requires_grad=True)

    def __call__(self, x, c_noise):
        f = super().__call__(x, c_noise)
        t = self.t.astype(int)
        low, high, variance = best_variance(self.schedule, np.maximum(t, 1))
        v = torch.from_numpy(2 * (np.log(variance) - low) / (high - low) - 1).float().reshape(-1, 1, 1, 1)
        early = torch.from_numpy(1 - self.t / self.schedule.T).float().reshape(-1, 1, 1, 1)
        basis = torch.stack((torch.ones_like(x), torch.tanh(x), early.expand_as(x)), 1)
        return torch.cat((f, v + (self.gamma.reshape(*self.gamma.shape, 1, 1, 1) * basis).sum(1)), 1)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_optimum_of_the_bound(kind):
    """At mean and variance of x_{t-1} given x_t the bound has no gradient (t = 0, a likelihood of levels, is left out)."""
    loss = create(kind, objective="vlb")
    net = Learned(SCHEDULE, loss.prediction)
    out = loss(net, batch())
    later = net.t > 0
    assert np.abs(z_scores(out, net.theta, later)).max() <= BY_CHANCE
    assert np.abs(z_scores(loss(net, batch()), net.gamma, later)).max() <= BY_CHANCE
    for parameter, k, size in ((net.theta, 0, 0.1), (net.theta, 1, 0.1), (net.gamma, 0, 0.3), (net.gamma, 2, 0.6)):
        with torch.no_grad():
            parameter[:, k] = size
        assert z_scores(loss(net, batch()), parameter, later)[k] >= 8, (k, size)
        with torch.no_grad():
            parameter.zero_()


def test_hybrid():
    """L_simple + lambda T L_t, where the mean feels the first term alone and the variance the second."""
    b = batch(500)
    outs = {}
    for name, options in (("hybrid", {"lambda_vlb": 0.01}), ("vlb", {"objective": "vlb"})):
        loss = create(**options)
        net = Learned(SCHEDULE, loss.prediction, 500)
        with torch.no_grad():
            net.theta[:, 0], net.gamma[:, 0] = 0.3, 0.2
        out = loss(net, b)
        outs[name] = (out.detach(), *torch.autograd.grad(out.sum(), (net.theta, net.gamma)))
    eps = Prediction("eps")
    net = Probe(Learned(SCHEDULE, eps, 500).exact, SCHEDULE, eps, 500)
    with torch.no_grad():
        net.theta[:, 0] = 0.3
    simple = losses.create("ddpm", SCHEDULE, eps)(net, b)
    (gradient,) = torch.autograd.grad(simple.sum(), net.theta)
    torch.testing.assert_close(outs["hybrid"][0], simple.detach() + 0.01 * outs["vlb"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs["hybrid"][1], gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs["hybrid"][2], 0.01 * outs["vlb"][2], rtol=1e-4, atol=1e-6)


def test_value_of_the_bound():
    """At the optimum E L_t = log2(Var(x_{t-1} | x_t) / beta~_t) / 2 bits a pixel."""
    loss = create(objective="vlb")
    net = Learned(SCHEDULE, loss.prediction, 20_000)
    got = loss(net, batch(20_000)).detach().double().numpy() / SCHEDULE.T
    t = net.t.astype(int)
    low, _, variance = best_variance(SCHEDULE, np.maximum(t, 1))
    difference = (got - 0.5 * (np.log(variance) - low) / math.log(2))[t > 0]
    assert abs(difference.mean()) <= BY_CHANCE * difference.std() / np.sqrt(len(difference))
    assert difference.std() / np.sqrt(len(difference)) <= 0.01 * got[t > 0].mean()


def test_bounds_are_the_samplers():
    """V means the same variance in training and in sampling, in every step that adds noise."""
    loss = create()
    plan = samplers.ddpm(SCHEDULE, loss.prediction, SCHEDULE.T, variance="learned")
    steps = [row.learned for row in plan.rows if row.learned is not None]
    np.testing.assert_allclose(steps, loss.table[:0:-1, :2], rtol=1e-9)


@pytest.mark.parametrize("std", [0.003, 0.02, 0.5])
def test_levels_of_a_pixel(std):
    """The 256 levels' masses are those of the normal between its bins' edges, and sum to 1."""
    levels = torch.arange(256).float() / 127.5 - 1
    for mean in (-1.2, -0.99, 0.004, 0.3, 1.0):
        got = _log_probability(levels, mean - levels, torch.full_like(levels, 2 * math.log(std))).double().exp().numpy()

        def cdf(x, mean=mean):
            return 0.5 * math.erfc((mean - x) / std / math.sqrt(2))

        edges = [-math.inf, *(-1 + (2 * i + 1) / 255 for i in range(255)), math.inf]
        expected = np.diff([cdf(e) for e in edges])
        assert abs(got.sum() - 1) <= 1e-5
        np.testing.assert_allclose(got, np.maximum(expected, 0), rtol=1e-4, atol=2e-6)


def test_a_pixel_far_off_has_finite_loss_and_gradient():
    off = torch.tensor([0.0, 1.9, -1.9, 1.9, -1.9], requires_grad=True)
    x0 = torch.tensor([0.0, 0.0, 0.0, -1.0, 1.0])
    out = _log_probability(x0, off, torch.full((5,), -12.0))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(off.grad).all()


def test_first_time():
    """At t = 0 the loss is the level's code length under N(D, exp(log variance)), with beta~_1 for beta~_0."""
    loss, b = create(objective="vlb"), batch(400, (1, 2, 2))
    b.x0 = (b.x0.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    seen = []
    got = loss(lambda x, c: seen.append((x, c)) or torch.cat((0.3 * x, 0 * x - 0.5), 1), b)
    x, c = seen[0]
    first = torch.nonzero(c == 0).flatten()
    assert len(first) >= 3
    beta, abar = SCHEDULE.betas, np.cumprod(1 - SCHEDULE.betas)
    low = math.log(beta[1] * (1 - abar[0]) / (1 - abar[1]))
    std = math.exp(0.5 * (0.25 * math.log(beta[0]) + 0.75 * low))
    d = (x.double() - math.sqrt(1 - abar[0]) * 0.3 * x.double()) / math.sqrt(abar[0])
    for i in first:
        bits = 0.0
        for pixel, mean in zip(b.x0[i].flatten().tolist(), d[i].flatten().tolist(), strict=True):
            low_edge = -math.inf if pixel < -0.999 else pixel - 1 / 255
            high_edge = math.inf if pixel > 0.999 else pixel + 1 / 255
            mass = 0.5 * (math.erf((high_edge - mean) / std / 2**0.5) - math.erf((low_edge - mean) / std / 2**0.5))
            bits -= math.log2(max(mass, 1e-12)) / 4
        assert got[i].item() / SCHEDULE.T == pytest.approx(bits, rel=1e-3)


def test_important_times():
    """Uniform until every t has its ten losses, then sqrt(E L^2) and a uniform remainder; weights undo it in the mean."""
    times = ImportantTimes(5)
    u = (np.arange(1000) + 0.5) / 1000
    for step in range(KEPT + 3):
        if step < KEPT:
            np.testing.assert_allclose(times.probabilities(), 0.2)
        t = np.arange(5)
        times.remember(torch.arange(5), t, torch.tensor([1.0, 2.0, 3.0, 4.0, step]))
        times.update()
    history = np.array([1, 2, 3, 4, math.sqrt(np.mean(np.arange(3, 13) ** 2))])
    np.testing.assert_allclose(times.probabilities(), (1 - UNIFORM) * history / history.sum() + UNIFORM / 5)
    t, weight = times.draw(u)
    np.testing.assert_allclose(np.bincount(t) / 1000, times.probabilities(), atol=1e-3)
    value = np.array([3.0, -1.0, 4.0, 1.0, 5.0])
    assert (weight * value[t]).mean() == pytest.approx(value.mean(), abs=0.02)


def test_history_does_not_depend_on_the_split():
    """One batch, or its halves in either order: the same history; only losses with a gradient are remembered."""
    histories, b = [], batch(64, (1, 2, 2))
    for parts in ([slice(0, 64)], [slice(32, 64), slice(0, 32)]):
        loss = create(importance=True)
        for _ in range(3):
            for p in parts:
                loss(lambda x, c: torch.cat((x, x), 1), Batch(b.x0[p], b.seeds[p]))
            loss.after_step(torch.nn.Identity(), 0.0)
        histories.append(loss.important.history)
    np.testing.assert_allclose(*histories, rtol=1e-5)
    loss = create(importance=True)
    with torch.no_grad():
        loss(lambda x, c: torch.cat((x, x), 1), b)
    assert not loss.important.seen


def test_ranks_share_their_history(monkeypatch):
    """Two processes with half a batch each end with the history of one that has it all."""
    b, whole, halves = batch(64, (1, 2, 2)), create(importance=True), [create(importance=True) for _ in range(2)]

    def net(x, c):
        return torch.cat((x, x), 1)

    whole(net, b)
    whole.after_step(torch.nn.Identity(), 0.0)
    for half, p in zip(halves, (slice(0, 32), slice(32, 64)), strict=True):
        half(net, Batch(b.x0[p], b.seeds[p]))
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda out, mine: sent.append(mine))
    for half in halves:  # what each of them sends, without what it keeps
        half.important.update()

    def gather(out, mine):
        out[:] = sent

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for half in halves:
        half.important.history[:] = np.nan
        half.after_step(torch.nn.Identity(), 0.0)
        np.testing.assert_allclose(half.important.history, whole.important.history, rtol=1e-5)


def test_state_is_what_a_resumed_run_needs():
    loss, b = create(importance=True, schedule=schedules.DDPM(T=4)), batch(200, (1, 2, 2))

    def net(x, c):
        return torch.cat((0.5 * x, 0.1 * x), 1)

    for _ in range(2):
        loss(net, b)
        loss.after_step(torch.nn.Identity(), 0.0)
    again = create(importance=True, schedule=schedules.DDPM(T=4))
    before = again(net, b)
    again.load_state_dict(loss.state_dict())
    assert not torch.equal(again(net, b), before) and torch.equal(again(net, b), loss(net, b))
    assert create().state_dict() == {}


def test_bad_requests():
    with pytest.raises(ValueError, match="objective: 'kl' is not known; use one of hybrid, vlb"):
        create(objective="kl")
    with pytest.raises(ValueError, match="schedule: learned variances need the discrete DDPM, got VP"):
        create(schedule=schedules.VP())
    with pytest.raises(ValueError, match="prediction: it has no variance to learn"):
        losses.create("iddpm", SCHEDULE, Prediction("eps"))
    with pytest.raises(ValueError, match=r"network: it returns 1 channels .* give it out_channels=2"):
        create()(lambda x, c: x, batch(2))

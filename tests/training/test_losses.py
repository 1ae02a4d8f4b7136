"""Losses against closed forms: perfect networks, and data whose best denoiser is known."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastdiff import Prediction, ops, schedules
from fastdiff.training import ddpm, ect, edm
from fastdiff.training.losses import Batch, linear_forms, normals, regression, uniforms

SEEDS = [3, 7, 2**40 + 5, 2**64 - 1]


def batch(n=4, progress=0.0, size=6):
    torch.manual_seed(0)
    x0 = torch.rand(n, 1, size, size) * 2 - 1
    return Batch(x0, ops.seed_tensor(SEEDS[:n] if n <= 4 else range(n)), None, progress)


def noise(b):
    return ops.philox_normal(b.seeds, 0, b.x0.shape[1:], domain=ops.Domain.TRAINING)


CASES = [
    ("ddpm", ddpm.loss, schedules.DDPM(), "eps"),
    ("ddpm", ddpm.loss, schedules.DDPM(law="cosine"), "v"),
    ("ddpm", ddpm.loss, schedules.VP(), "x0"),
    ("edm", edm.loss, schedules.EDM(), "edm"),
    ("edm", edm.loss, schedules.EDM(), "eps"),
    ("edm", edm.loss, schedules.VP(), "edm"),
]


def config_of(toy_config, name, schedule, kind):
    return dataclasses.replace(toy_config(name), schedule=schedule, prediction=Prediction(kind))


@pytest.mark.parametrize(("name", "loss", "schedule", "kind"), CASES, ids=lambda v: getattr(v, "name", v))
def test_perfect_network(name, loss, schedule, kind, toy_config):
    """A network that knows x0 and n, and so returns F*, has loss 0; one that is off by 1 has loss 1."""
    config, b = config_of(toy_config, name, schedule, kind), batch()
    p = config.prediction

    def perfect(x, c_noise, offset=0.0):
        # t from c_noise, whichever kind wrote it
        t = schedule.time_of(np.exp(4 * c_noise.double().numpy())) if kind == "edm" else c_noise.double().numpy()
        b_x0, b_n = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in p.target(schedule, t))
        c, a, s = p.coefficients(schedule, t).c_in, schedule.alpha(t), schedule.sigma(t)
        a, s = (torch.from_numpy(np.asarray(c * v)).reshape(-1, 1, 1, 1) for v in (a, s))
        # and the input is what it should be: c_in (alpha x0 + sigma n)
        torch.testing.assert_close(x.double(), a * b.x0 + s * noise(b), rtol=1e-4, atol=1e-4)
        return (b_x0 * b.x0 + b_n * noise(b) + offset).float()

    assert loss(perfect, config, b).shape == (4,)
    # t goes through float32, which moves F* of size up to 2 by about 1e-5
    assert loss(perfect, config, b).max() <= 1e-8
    torch.testing.assert_close(loss(lambda x, c: perfect(x, c, 1.0), config, b), torch.ones(4), rtol=0, atol=1e-4)


def test_edm_loss_is_weighted_denoising(toy_config):
    """Mean over pixels of (s^2 + sd^2) / (s sd)^2 (D - x0)^2, the paper's form."""
    config, b = toy_config("edm"), batch()
    s = np.exp(-1.2 + 1.2 * normals(b.seeds))
    got = edm.loss(lambda x, c: torch.tanh(x), config, b)
    for i in range(4):
        x = b.x0[i].double() + s[i] * noise(b)[i].double()
        skip, out, inner = (
            0.25 / (s[i] ** 2 + 0.25),
            s[i] * 0.5 / math.sqrt(s[i] ** 2 + 0.25),
            1 / math.sqrt(s[i] ** 2 + 0.25),
        )
        d = skip * x + out * torch.tanh(inner * x)
        expected = (s[i] ** 2 + 0.25) / (s[i] * 0.5) ** 2 * (d - b.x0[i]).square().mean()
        assert got[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_times_follow_their_laws():
    """ln sigma ~ N(0, 1) before scaling and uniform t: Kolmogorov-Smirnov distance below 1.95 / sqrt(n) (p = 1e-3)."""
    seeds, n = ops.seed_tensor(range(4000)), 4000
    u, z = np.sort(uniforms(seeds)), np.sort(normals(seeds))
    phi = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    ranks = (np.arange(n) + 0.5) / n
    assert np.abs(u - ranks).max() <= 1.95 / math.sqrt(n) and np.abs(phi - ranks).max() <= 1.95 / math.sqrt(n)
    assert not np.array_equal(normals(seeds, 0), normals(seeds, 1))


def test_ddpm_times_are_indices(toy_config):
    """Every index is a whole number in 0 ... T-1, ends included over many seeds."""
    seen = []
    config = dataclasses.replace(toy_config("ddpm"), schedule=schedules.DDPM(T=10))
    ddpm.loss(lambda x, c: seen.append(c) or x, config, batch(400, size=2))
    assert sorted(set(seen[0].tolist())) == list(map(float, range(10)))


def test_pair_shares_its_noise():
    """x_t - x0 over t and x_r - x0 over r are one and the same draw: power-of-two amounts, so no bit may differ."""
    b = dataclasses.replace(batch(), x0=torch.zeros(4, 1, 6, 6))
    one, four = np.ones(4), np.full(4, 4.0)
    x_t, x_r = linear_forms(b, (one, four), (one, one))
    assert torch.equal(x_t, 4 * x_r) and torch.equal(x_r, noise(b))


def ect_config(toy_config, **changes):
    return dataclasses.replace(toy_config("ect"), **changes)


def test_ect_earlier_time():
    """r rises towards t from stage to stage, is 0 where the gap reaches past 0, and never exceeds t."""
    t = np.geomspace(1e-3, 80, 50)
    last = np.zeros_like(t)
    for stage in range(8):
        r = ect.earlier_time(t, 2.0, stage)
        n = 1 + 8 / (1 + np.exp(t))
        np.testing.assert_allclose(r, np.maximum(0, t * (1 - n / 2.0 ** (stage + 1))), rtol=1e-12)
        assert np.all(r >= last) and np.all(r < t)
        last = r
    assert not ect.earlier_time(t, 1.0, 0).any()  # n >= 1, so q = 1 makes every r zero


def test_ect_with_r_zero_is_diffusion(toy_config):
    """At r = 0 the target is x0: the distance |D - x0| itself, over t, per root pixel."""
    config = ect_config(toy_config, q=1.0, stages=1, huber=0.0)
    b, calls = batch(), []

    def net(x, c_noise):
        calls.append((x, c_noise))
        return torch.tanh(x)

    got = ect.loss(net, config, b)
    t = np.clip(np.exp(-1.1 + 2.0 * normals(b.seeds)), 1e-4, 80.0)
    for i in range(4):
        skip, out, inner = (
            0.25 / (t[i] ** 2 + 0.25),
            t[i] * 0.5 / math.sqrt(t[i] ** 2 + 0.25),
            1 / math.sqrt(t[i] ** 2 + 0.25),
        )
        x = b.x0[i].double() + t[i] * noise(b)[i].double()
        d = skip * x + out * torch.tanh(inner * x)
        assert got[i].item() == pytest.approx(((d - b.x0[i]).norm() / t[i] / 6).item(), rel=2e-4)


def test_ect_perfect_network(toy_config):
    """The exact consistency function of a single image, D = x0 at every t, has loss 0 in every stage."""
    for progress in (0.0, 0.5, 0.99):
        b = batch(progress=progress)

        def net(x, c_noise, x0=b.x0):
            s = torch.exp(4 * c_noise.double()).reshape(-1, 1, 1, 1)
            skip, out = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt()
            return ((x0 - skip * x.double() * (s**2 + 0.25).sqrt()) / out).float()

        got = ect.loss(net, ect_config(toy_config), b)
        # |D - D'| is rounding, about 1e-6 of the largest x at the largest t; 1 / (t - r) magnifies it at small t
        assert got.max() <= 1e-3


def test_ect_gradient_and_dropout(toy_config):
    """Both evaluations see one dropout mask, and only the one at t is differentiated."""
    drop, masks = torch.nn.Dropout(0.5), []
    weight = torch.ones(1, requires_grad=True)

    def net(x, c_noise):
        masks.append(drop(torch.ones(50)))
        return weight * x

    for later in (0.0, 0.9):
        masks.clear()
        torch.manual_seed(4)
        out = ect.loss(net, ect_config(toy_config), batch(progress=later))
        assert len(masks) == 2 and torch.equal(*masks)
        assert out.requires_grad
    graph = []

    def spy(x, c_noise):
        graph.append(torch.is_grad_enabled())
        return weight * x

    ect.loss(spy, ect_config(toy_config), batch(progress=0.9))
    assert sorted(graph) == [False, True]


def test_labels_reach_the_network(toy_config):
    b, seen = batch(), []
    b.labels = torch.tensor([0, 1, 1, 0])
    for name, loss in (("edm", edm.loss), ("ddpm", ddpm.loss), ("ect", ect.loss)):
        seen.clear()
        loss(lambda x, c, labels: seen.append(labels) or x, toy_config(name), b)
        assert all(torch.equal(s, b.labels) for s in seen) and seen


def test_loss_belongs_to_the_sample(toy_config):
    """Seeds decide times and noise: a batch in two halves has the same losses."""
    b = batch()
    for name, loss in (("edm", edm.loss), ("ddpm", ddpm.loss), ("ect", ect.loss)):
        whole = loss(lambda x, c: torch.sin(x), toy_config(name), b)
        halves = [
            loss(lambda x, c: torch.sin(x), toy_config(name), Batch(b.x0[p], b.seeds[p], None, 0.0))
            for p in (slice(0, 2), slice(2, 4))
        ]
        torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-5, atol=1e-6)


def test_regression_of_the_best_constant():
    """Data that is all zero: predicting eps as x / sigma is exact, predicting 0 costs E n^2 = 1."""
    b = Batch(torch.zeros(64, 1, 16, 16), ops.seed_tensor(range(64)), None, 0.0)
    t = np.linspace(1, 5, 64)
    zero = regression(lambda x, c: torch.zeros_like(x), schedules.EDM(), Prediction("eps"), b, t)
    assert abs(zero.mean().item() - 1) <= 4 * math.sqrt(2 / (64 * 256))  # 4 standard errors of chi-squared
    exact = regression(lambda x, c: x / c.reshape(-1, 1, 1, 1), schedules.EDM(), Prediction("eps"), b, t)
    assert exact.max() <= 1e-12

"""Losses against closed forms: perfect networks, and data whose best denoiser is known."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff import Prediction, ops, schedules
from fastdiff.training import losses
from fastdiff.training.losses import Batch
from fastdiff.training.losses.base import linear_forms, normals, uniforms
from fastdiff.training.losses.ect import earlier_time

SEEDS = [3, 7, 2**40 + 5, 2**64 - 1]


def batch(n=4, progress=0.0, size=6):
    torch.manual_seed(0)
    x0 = torch.rand(n, 1, size, size) * 2 - 1
    return Batch(x0, ops.seed_tensor(SEEDS[:n] if n <= 4 else range(n)), None, progress)


def noise(b):
    return ops.philox_normal(b.seeds, 0, b.x0.shape[1:], domain=ops.Domain.TRAINING)


def create(name, schedule=None, kind="edm", **options):
    return losses.create(name, schedule or schedules.EDM(), Prediction(kind), options)


# loss, schedule, prediction, and the weight on (F - F*)^2 in the paper's own words (r = sigma / alpha)
CASES = [
    ("ddpm", schedules.DDPM(), "eps", lambda r, a: 1),
    ("ddpm", schedules.DDPM(law="cosine"), "v", lambda r, a: 1),
    ("ddpm", schedules.VP(), "x0", lambda r, a: 1),
    ("edm", schedules.EDM(), "edm", lambda r, a: 1),
    ("edm", schedules.EDM(), "eps", lambda r, a: (r**2 + 0.25) / 0.25),
    ("edm", schedules.VP(), "edm", lambda r, a: 1),
    ("min-snr", schedules.DDPM(), "eps", lambda r, a: np.minimum(r**-2, 5) * r**2),
    ("min-snr", schedules.DDPM(), "x0", lambda r, a: np.minimum(r**-2, 5)),
    ("min-snr", schedules.VP(), "v", lambda r, a: np.minimum(r**-2, 5) / (r**-2 + 1)),
    ("sde", schedules.VP(), "score", lambda r, a: (r * a) ** 2),
    ("sde", schedules.VE(), "ve", lambda r, a: 1),
    ("flow", schedules.Flow(), "flow", lambda r, a: 1),
    ("flow", schedules.Flow(), "x0", lambda r, a: (1 + 1 / r) ** 2),
]
IDS = [f"{name}-{schedule.name}-{kind}" for name, schedule, kind, _ in CASES]


@pytest.mark.parametrize(("name", "schedule", "kind", "weight"), CASES, ids=IDS)
def test_perfect_network(name, schedule, kind, weight):
    """A network that knows x0 and n, and so returns F*, has loss 0; one that is off by 1 has the family's weight."""
    loss, b, ratios = create(name, schedule, kind), batch(), []
    p = loss.prediction

    def perfect(x, c_noise, offset=0.0):
        # t from c_noise, whichever kind wrote it
        c = c_noise.double().numpy()
        t = schedule.time_of(np.exp(4 * c)) if kind == "edm" else np.exp(c) if kind == "ve" else c
        ratios[:] = [schedule.ratio(t), schedule.alpha(t)]
        b_x0, b_n = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in p.target(schedule, t))
        c, a, s = p.coefficients(schedule, t).c_in, schedule.alpha(t), schedule.sigma(t)
        a, s = (torch.from_numpy(np.asarray(c * v)).reshape(-1, 1, 1, 1) for v in (a, s))
        # and the input is what it should be: c_in (alpha x0 + sigma n)
        torch.testing.assert_close(x.double(), a * b.x0 + s * noise(b), rtol=1e-4, atol=1e-4)
        return (b_x0 * b.x0 + b_n * noise(b) + offset).float()

    assert loss(perfect, b).shape == (4,)
    zero, one = loss(perfect, b), loss(lambda x, c: perfect(x, c, 1.0), b)
    expected = torch.from_numpy(np.broadcast_to(weight(*ratios), 4).copy()).float()
    # t goes through float32, which moves F* by 1e-5 of its size
    assert (zero <= 1e-8 * expected * max(1, p.target(schedule, schedule.time_of(ratios[0]))[1].max() ** 2)).all()
    torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)


def test_edm_loss_is_weighted_denoising():
    """Mean over pixels of (s^2 + sd^2) / (s sd)^2 (D - x0)^2, the paper's form."""
    b = batch()
    s = np.exp(-1.2 + 1.2 * normals(b.seeds))
    got = create("edm")(lambda x, c: torch.tanh(x), b)
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


def test_ddpm_times_are_indices():
    """Every index is a whole number in 0 ... T-1, ends included over many seeds."""
    seen = []
    create("ddpm", schedules.DDPM(T=10), "eps")(lambda x, c: seen.append(c) or x, batch(400, size=2))
    assert sorted(set(seen[0].tolist())) == list(map(float, range(10)))


def test_pair_shares_its_noise():
    """x_t - x0 over t and x_r - x0 over r are one and the same draw: power-of-two amounts, so no bit may differ."""
    b = dataclasses.replace(batch(), x0=torch.zeros(4, 1, 6, 6))
    one, four = np.ones(4), np.full(4, 4.0)
    x_t, x_r = linear_forms(b, (one, four), (one, one))
    assert torch.equal(x_t, 4 * x_r) and torch.equal(x_r, noise(b))


def test_ect_earlier_time():
    """r rises towards t from stage to stage, is 0 where the gap reaches past 0, and never exceeds t."""
    t = np.geomspace(1e-3, 80, 50)
    last = np.zeros_like(t)
    for stage in range(8):
        r = earlier_time(t, 2.0, stage)
        n = 1 + 8 / (1 + np.exp(t))
        np.testing.assert_allclose(r, np.maximum(0, t * (1 - n / 2.0 ** (stage + 1))), rtol=1e-12)
        assert np.all(r >= last) and np.all(r < t)
        last = r
    assert not earlier_time(t, 1.0, 0).any()  # n >= 1, so q = 1 makes every r zero


def test_ect_with_r_zero_is_diffusion():
    """At r = 0 the target is x0: the distance |D - x0| itself, over t, per root pixel."""
    b, calls = batch(), []

    def net(x, c_noise):
        calls.append((x, c_noise))
        return torch.tanh(x)

    got = create("ect", q=1.0, stages=1)(net, b)
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


def test_ect_perfect_network():
    """The exact consistency function of a single image, D = x0 at every t, has loss 0 in every stage."""
    for progress in (0.0, 0.5, 0.99):
        b = batch(progress=progress)

        def net(x, c_noise, x0=b.x0):
            s = torch.exp(4 * c_noise.double()).reshape(-1, 1, 1, 1)
            skip, out = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt()
            return ((x0 - skip * x.double() * (s**2 + 0.25).sqrt()) / out).float()

        got = create("ect")(net, b)
        # |D - D'| is rounding, about 1e-6 of the largest x at the largest t; 1 / (t - r) magnifies it at small t
        assert got.max() <= 1e-3


def test_ect_gradient_and_dropout():
    """Both evaluations see one dropout mask, and only the one at t is differentiated."""
    drop, masks = torch.nn.Dropout(0.5), []
    weight = torch.ones(1, requires_grad=True)

    def net(x, c_noise):
        masks.append(drop(torch.ones(50)))
        return weight * x

    for later in (0.0, 0.9):
        masks.clear()
        torch.manual_seed(4)
        out = create("ect")(net, batch(progress=later))
        assert len(masks) == 2 and torch.equal(*masks)
        assert out.requires_grad
    graph = []

    def spy(x, c_noise):
        graph.append(torch.is_grad_enabled())
        return weight * x

    create("ect")(spy, batch(progress=0.9))
    assert sorted(graph) == [False, True]


def every():
    """One of each loss that needs nothing but a network."""
    for name, schedule, kind, _ in CASES:
        yield create(name, schedule, kind)
    for name in ("ct", "ict"):
        yield create(name, kind="consistency")
    yield create("ect")


def test_labels_reach_the_network():
    b, seen = batch(), []
    b.labels = torch.tensor([0, 1, 1, 0])
    for loss in every():
        seen.clear()
        loss(lambda x, c, labels: seen.append(labels) or x, b)
        assert all(torch.equal(s, b.labels) for s in seen) and seen


def test_loss_belongs_to_the_sample():
    """Seeds decide times and noise: a batch in two halves has the same losses."""
    b = batch()
    for loss in every():
        whole = loss(lambda x, c: torch.sin(x), b)
        halves = [loss(lambda x, c: torch.sin(x), Batch(b.x0[p], b.seeds[p], None, 0.0)) for p in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-5, atol=1e-6)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"loss: 'ddmp' is not known; did you mean ddpm\? There are ddpm, "):
        create("ddmp")
    with pytest.raises(ValueError, match=r"options: the loss 'edm' has no option 'pmean'; did you mean p_mean\?"):
        create("edm", pmean=1.0)
    with pytest.raises(ValueError, match="options: the loss 'ddpm' has no option 'gamma'; it has none"):
        create("ddpm", gamma=1.0)
    for name, options, says in (
        ("edm", {"p_mean": "low"}, "options: p_mean is a finite number, such as its default -1.2; got 'low'"),
        ("edm", {"p_mean": math.nan}, "options: p_mean is a finite number, .* got nan"),
        ("ncsn", {"levels": 2.5}, "options: levels is a whole number, such as its default 10; got 2.5"),
        ("sde", {"importance": 1}, "options: importance is True or False, such as its default False; got 1"),
        ("flow", {"law": 3}, "options: law is a word, such as its default 'uniform'; got 3"),
        ("min-snr", {"gamma": 0}, "gamma: 0 is out of range; use a number > 0"),
    ):
        with pytest.raises(ValueError, match=says):
            create(name, **options)
    assert create("edm", p_mean=-1).p_mean == -1
    with pytest.raises(ValueError, match="teacher: the loss 'cd' distils a diffusion model; give one"):
        create("cd", kind="consistency")
    with pytest.raises(ValueError, match="teacher: the loss 'edm' has no use for one"):
        losses.create("edm", schedules.EDM(), Prediction("edm"), teacher=lambda x, t: x)
    with pytest.raises(ValueError, match="perceptual: the loss 'edm' compares no images"):
        losses.create("edm", schedules.EDM(), Prediction("edm"), perceptual=lambda a, b: a)


def test_network_of_the_wrong_width():
    with pytest.raises(ValueError, match=r"network: it returns 2 channels .* learned_variance=False give it out_channels=1"):
        create("edm")(lambda x, c: torch.cat((x, x), 1), batch())


def test_page_of_losses():
    """docs/losses.md has every loss with its options and their defaults, and no other."""
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    page = {row[0].strip("`"): set(row[3].split()) for row in rows}
    assert page == {name: {f"{k}={v}" for k, v in losses.options(name).items()} for name in losses.LOSSES}

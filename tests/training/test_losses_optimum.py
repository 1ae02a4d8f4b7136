"""The optimum of each diffusion loss is the exact denoiser, score or velocity of a Gaussian mixture, in closed form."""

import numpy as np
import pytest
import torch
from mixture import Mixture
from stationary import Probe, check_stationary

from fastdiff import Prediction, ops, schedules
from fastdiff.training import losses
from fastdiff.training.losses import Batch

DATA = Mixture(per_pixel=True)
B, SHAPE = 6000, (1, 4, 4)


def batch(n=B, shape=SHAPE, data=DATA):
    return Batch(data.draw((n, *shape)), ops.seed_tensor(range(n)))


def exact(schedule, data=DATA):
    def denoise(x, t):
        a, s = (torch.from_numpy(np.asarray(v)).reshape(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))
        return data.denoise(x, a, s)

    return denoise


EDM, VE = schedules.EDM(0.02, 20.0), schedules.VE(0.05, 20.0)
CASES = {
    "ddpm-eps": ("ddpm", schedules.DDPM(), "eps", {}),
    "ddpm-x0": ("ddpm", schedules.DDPM(law="cosine"), "x0", {}),
    "ddpm-v": ("ddpm", schedules.VP(), "v", {}),
    "min-snr-eps": ("min-snr", schedules.DDPM(), "eps", {}),
    "min-snr-v": ("min-snr", schedules.VP(), "v", {"gamma": 1.0}),
    "ncsn-ve": ("ncsn", VE, "ve", {}),
    "ncsn-score": ("ncsn", VE, "score", {"levels": 5}),
    "sde-vp": ("sde", schedules.VP(), "score", {}),
    "sde-subvp": ("sde", schedules.SubVP(), "eps", {}),
    "sde-ve": ("sde", VE, "ve", {}),
    "likelihood-vp": ("sde", schedules.VP(t_min=0.01), "eps", {"weighting": "likelihood"}),
    "likelihood-subvp": ("sde", schedules.SubVP(t_min=0.05), "v", {"weighting": "likelihood"}),
    "likelihood-ve": ("sde", VE, "ve", {"weighting": "likelihood"}),
    "important-vp": ("sde", schedules.VP(), "eps", {"weighting": "likelihood", "importance": True}),
    "important-subvp": ("sde", schedules.SubVP(), "eps", {"weighting": "likelihood", "importance": True}),
    "important-ve": ("sde", VE, "ve", {"weighting": "likelihood", "importance": True}),
    "edm": ("edm", EDM, "edm", {}),
    "edm-on-vp": ("edm", schedules.VP(), "edm", {}),
    "edm-of-eps": ("edm", EDM, "eps", {"p_std": 0.7}),
    "flow": ("flow", schedules.Flow(), "flow", {}),
    "flow-v": ("flow", schedules.Flow(), "v", {"law": "logit_normal", "mean": -0.5}),
    "sliced": ("sliced", VE, "ve", {"levels": 3}),
    "implicit": ("implicit", schedules.EDM(0.1, 1.0), "edm", {"levels": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_optimum(case):
    """No gradient at the exact denoiser of a two-component mixture; a network that is off is led back to it."""
    name, schedule, kind, options = CASES[case]
    loss = losses.create(name, schedule, Prediction(kind), options)
    check_stationary(loss, Probe(exact(schedule), schedule, loss.prediction, B), batch())


def test_score_matching_value():
    """At the optimum both objectives are -E ||s||^2 / 2: -sigma^2 / (2 (0.25 + sigma^2)) a pixel for N(0.2, 0.5^2)."""
    schedule, data = schedules.EDM(0.4, 1.0), Mixture((1.0,), (0.2,), (0.5,))
    b = batch(4000, (1, 3, 3), data)
    for name in ("implicit", "sliced"):
        loss = losses.create(name, schedule, Prediction("edm"))
        got = loss(Probe(exact(schedule, data), schedule, loss.prediction, 4000), b).detach().double()
        error = got.std() / 4000**0.5
        assert abs(got.mean() + 0.5 * 0.16 / 0.41) <= 4.5 * error and error <= 0.01


@pytest.mark.parametrize("schedule", [schedules.VP(t_min=0.01), schedules.SubVP(t_min=0.05), VE], ids=lambda s: s.name)
def test_importance_keeps_the_expectation(schedule):
    """Likelihood weighting by importance-sampled t: the same mean, whatever the network."""
    means, errors = [], []
    for importance in (False, True):
        options = {"weighting": "likelihood", "importance": importance}
        got = losses.create("sde", schedule, Prediction("eps"), options)(lambda x, c: 0.5 * x, batch(20_000)).double()
        means.append(got.mean())
        errors.append(got.std() / 20_000**0.5)
    assert abs(means[0] - means[1]) <= 4.5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    assert errors[1] <= errors[0] * 1.02 and errors[0] <= 0.1 * means[0]


def test_likelihood_weight_is_g_squared():
    """sigma^2 / g^2 of the likelihood weighting is the score weighting, sample by sample."""
    for schedule in (schedules.VP(), schedules.SubVP(), VE):
        seen, b = [], batch(50)
        net = lambda x, c, seen=seen: seen.append(c.double()) or 0.5 * x  # noqa: E731
        score, likelihood = (
            losses.create("sde", schedule, Prediction("eps"), {"weighting": w})(net, b) for w in ("score", "likelihood")
        )
        t = seen[0].numpy()
        g2 = torch.from_numpy(schedule.drift_diffusion(t)[1] / schedule.sigma(t) ** 2).float()
        torch.testing.assert_close(likelihood, score * g2, rtol=1e-3, atol=0)


def test_levels():
    """Levels are in geometric progression, ends included, and equally likely."""
    seen = []
    losses.create("ncsn", VE, Prediction("eps"), {"levels": 4})(lambda x, c: seen.append(c) or x, batch(4000))
    levels, counts = np.unique(seen[0].numpy(), return_counts=True)
    np.testing.assert_allclose(levels, 0.05 * 400 ** (np.arange(4) / 3), rtol=1e-6)
    assert np.abs(counts - 1000).max() <= 4.5 * (1000 * 0.75) ** 0.5


def test_sde_times():
    """VE draws ln sigma uniformly, VP and sub-VP t itself, importance ln(sigma / alpha)."""
    u = (np.arange(4000) + 0.5) / 4000
    for schedule, options, place in (
        (VE, {}, lambda t: np.log(t / 0.05) / np.log(400)),
        (schedules.VP(), {}, lambda t: (t - 1e-3) / (1 - 1e-3)),
        (
            schedules.VP(),
            {"weighting": "likelihood", "importance": True},
            lambda t: (
                np.log(schedules.VP().ratio(t) / schedules.VP().ratio(1e-3))
                / -np.log(schedules.VP().ratio(1e-3) / schedules.VP().ratio(1.0))
            ),
        ),
    ):
        seen = []
        losses.create("sde", schedule, Prediction("eps"), options)(lambda x, c, s=seen: s.append(c) or x, batch(4000))
        assert np.abs(np.sort(place(seen[0].double().numpy())) - u).max() <= 1.95 / 4000**0.5


def test_sliced_uses_one_projection_per_sample():
    """Its trace is v^T J v with v the sample's own draw: another draw than the noise, the same in any batch."""
    loss = losses.create("sliced", VE, Prediction("x0"))
    b = batch(3, (1, 2, 3))
    v = ops.philox_normal(b.seeds, losses.Draw.PROJECTION, (1, 2, 3), domain=ops.Domain.AUGMENT)
    x = torch.randn(3, 1, 2, 3, requires_grad=True)
    weights = torch.randn(6, 6)
    got = loss.trace((x.flatten(1) @ weights.T).reshape(x.shape), x, b.seeds)
    torch.testing.assert_close(got, torch.einsum("bi,ij,bj->b", v.flatten(1), weights, v.flatten(1)))
    exact_trace = losses.create("implicit", VE, Prediction("x0")).trace(
        (x.flatten(1) @ weights.T).reshape(x.shape), x, b.seeds
    )
    torch.testing.assert_close(exact_trace, weights.trace().expand(3))


def test_bad_requests():
    eps = Prediction("eps")
    with pytest.raises(ValueError, match="schedule: flow matching needs the path Flow, got VP"):
        losses.create("flow", schedules.VP(), eps)
    with pytest.raises(ValueError, match="law: 'beta' is not known; use one of uniform, logit_normal"):
        losses.create("flow", schedules.Flow(), eps, {"law": "beta"})
    with pytest.raises(ValueError, match="schedule: the score SDE loss needs VP, SubVP or VE, got DDPM"):
        losses.create("sde", schedules.DDPM(), eps)
    with pytest.raises(ValueError, match="importance: it draws t for weighting='likelihood'"):
        losses.create("sde", schedules.VP(), eps, {"importance": True})
    with pytest.raises(ValueError, match="levels: 0 is out of range"):
        losses.create("ncsn", VE, eps, {"levels": 0})
    with pytest.raises(ValueError, match="x0: the exact trace takes one derivative for each of 2352 pixels"):
        losses.create("implicit", VE, eps)(lambda x, c: x, batch(2, (3, 28, 28)))


def test_fused_networks_are_not_differentiated_twice():
    """Score matching without a target needs plain torch modules; a fused network says so in place of a wrong gradient."""
    from tiny import tiny

    from fastdiff import UNet

    loss = losses.create("sliced", VE, Prediction("ve"))(UNet(tiny()), batch(2, (1, 8, 8)))
    with pytest.raises(
        RuntimeError, match="has a first derivative alone, and this asks for its second; use a network of plain"
    ):
        loss.sum().backward()

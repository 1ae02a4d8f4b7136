"""The adaptive solver: tolerance kept on exact data, samples independent, evaluations counted, recorded runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdiff
from fastdiff import Denoiser, Prediction, ops, samplers
from fastdiff.schedules import EDM, VE, VP

MU, STD = 0.3, 0.25


class Counting:
    """The x0 network of any data, at a time for each sample; counts evaluations sample by sample."""

    def __init__(self, schedule, data):
        self.schedule, self.data, self.samples = schedule, data, 0

    def __call__(self, x, t):
        self.samples += len(x)
        levels = [(float(self.schedule.alpha(float(u))), float(self.schedule.sigma(float(u)))) for u in t]
        return torch.cat([self.data.denoise(x[i : i + 1].double(), a, s) for i, (a, s) in enumerate(levels)])


def double(network, schedule):
    """A denoiser whose D keeps float64: `Denoiser` answers in float32."""

    class Exact(Denoiser):
        def __call__(self, x, t, labels=None):
            return self.network(x, np.broadcast_to(t, (len(x),)))

    return Exact(network, schedule, Prediction("x0", raw=True))


@pytest.mark.parametrize("schedule", [EDM(), VP()])
def test_tolerance_and_independence(schedule, make_mixture):
    """Tighter tolerances, smaller errors, of the tolerance's size; one sample alone is the same to the bit."""
    data = make_mixture((1.0,), (MU,), (STD,), per_pixel=True)
    y = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y *= torch.tensor([0.01, 0.3, 1.0, 1.0, 3.0]).reshape(-1, 1, 1, 1)
    first, last = (float(schedule.ratio(t)) for t in (schedule.t_max, schedule.t_min))
    x = y * schedule.prior_std
    gain = math.sqrt((STD**2 + last**2) / (STD**2 + first**2))
    truth = float(schedule.alpha(schedule.t_min)) * (MU + (x / float(schedule.alpha(schedule.t_max)) - MU) * gain)
    errors, counts = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        network = Counting(schedule, data)
        denoiser = double(network, schedule)
        got, nfe = samplers.rk45(denoiser, x, rtol=tolerance, atol=tolerance, to_image=False)
        assert nfe.sum() == network.samples and (nfe % 6 == 1).all()
        errors.append((got - truth).abs().max().item())
        counts.append(int(nfe.max()))
        alone, n = samplers.rk45(denoiser, x[3:4], rtol=tolerance, atol=tolerance, to_image=False)
        assert torch.equal(alone[0], got[3]) and n[0] == nfe[3]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and all(
        e <= 10 * tol for e, tol in zip(errors, (1e-3, 1e-5, 1e-7), strict=True)
    )
    assert counts[0] < counts[1] < counts[2] < 1000


def test_bad_requests(make_mixture):
    denoiser = double(Counting(EDM(), make_mixture()), EDM())
    x = torch.zeros(1, 1, 2, 2)
    for options, words in (
        ({"rtol": 0.0}, "rtol, atol: 0.0"),
        ({"t_start": 1.0, "t_end": 2.0}, "from much noise to little"),
        ({"t_start": 100.0}, "t_start: 100.0 lies outside EDM"),
    ):
        with pytest.raises(ValueError, match=words):
            samplers.rk45(denoiser, x, **options)
    with pytest.raises(RuntimeError, match="rk45: a sample needs more than 20 evaluations"):
        samplers.rk45(denoiser, x + 80, rtol=1e-9, atol=1e-9, most=20)


@pytest.mark.parametrize(("name", "schedule"), [("score_sde/vp_ode", VP()), ("score_sde/ve_ode", VE())])
def test_score_sde(name, schedule, make_mixture):
    """Their SciPy RK45 with 1e-5 steps all images as one vector, in another variable; after it, one denoising step.

    Their suggested tolerance is 2e-3. That step leaves 8e-4 of VP's noise, where D leaves none.
    """
    peers = load_file(Path(__file__).parents[1] / "data" / "samplers" / "peers.safetensors")
    start = 1.0 if isinstance(schedule, VP) else schedule.prior_std
    denoiser = double(Counting(schedule, make_mixture()), schedule)
    got, nfe = samplers.rk45(denoiser, peers["z"].double() * start)
    assert (got - peers[f"{name}/x_final"]).abs().max() <= peers[f"{name}/atol"] and nfe.max() < 400


def wrapped(schedule, mu=MU, std=STD, log=None, labels=0):
    """Gaussian data as an x0 network at a time for each sample; class c has the mean c / 10, class 2 the mean mu."""

    def net(x, t, y=None):
        a, s = (torch.from_numpy(f(t.double().cpu().numpy())).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        if log is not None:
            log.append((x.dtype, len(x)))
        mean = mu if y is None else torch.where(y == 2, mu, y / 10.0).double().reshape(-1, 1, 1, 1)
        return (mean + a * std**2 / (a**2 * std**2 + s**2) * (x.double() - a * mean)).to(x.dtype)

    return fastdiff.wrap(net, schedule=schedule, prediction="x0", shape=(1, 4, 4), labels=labels)


def solution(schedule, x, mu=MU, t=None):
    """The image D at t_min of the ODE's solution from x at t (t_max)."""
    t = schedule.t_max if t is None else t
    first, last = float(schedule.ratio(t)), float(schedule.ratio(schedule.t_min))
    y = mu + (x / float(schedule.alpha(t)) - mu) * math.sqrt((STD**2 + last**2) / (STD**2 + first**2))
    return mu + STD**2 / (STD**2 + last**2) * (y - mu)


@pytest.mark.parametrize("schedule", [EDM(), VP()])
def test_sampled(schedule):
    """fastdiff.sample(sampler="rk45"): the exact solution to its tolerance, evaluations counted, whatever the batch."""
    log = []
    model, seeds = wrapped(schedule, log=log), [1, 2, 2**63]
    request = {"sampler": "rk45", "clip_output": False, "rtol": 1e-6, "atol": 1e-6, "dtype": torch.float64}
    result = fastdiff.run(model, seeds=seeds, **request)
    z = ops.philox_normal(ops.seed_tensor(seeds), 0, model.shape).double()
    assert (result.images - solution(schedule, z * schedule.prior_std)).abs().max() <= 1e-5
    assert sum(n for _, n in log) == sum(result.plan.counts) and result.evaluations == max(result.plan.counts)
    assert {d for d, _ in log} == {torch.float64} and "rtol 1e-06" in result.plan.describe()
    alone = fastdiff.run(model, seeds=seeds, batch_size=1, **request)
    assert torch.equal(alone.images, result.images) and alone.plan.counts == result.plan.counts
    given = fastdiff.sample(model, noise=[z], **request)
    assert torch.equal(given, result.images)
    image, t = torch.full(model.shape, -0.4), float(schedule.time_of(0.5))
    started = fastdiff.sample(model, seeds=seeds, start=image, t_start=t, **request)
    x = float(schedule.alpha(t)) * image.double() + float(schedule.sigma(t)) * z
    assert (started - solution(schedule, x, t=t)).abs().max() <= 1e-5


def test_guided():
    """Guidance, a weight for each image, is the ODE of the guided mean; a threshold applies to every D."""
    model, seeds, weights = wrapped(EDM(), labels=3), [4, 5, 6], [1.0, 2.5, 0.0]
    request = {"sampler": "rk45", "clip_output": False, "rtol": 1e-6, "atol": 1e-6, "dtype": torch.float64}
    guide = fastdiff.Guide(weights, null_label=2)
    got = fastdiff.sample(model, seeds=seeds, labels=1, guidance=guide, batch_size=2, **request)
    z = ops.philox_normal(ops.seed_tensor(seeds), 0, model.shape).double() * 80
    for i, w in enumerate(weights):
        assert (got[i] - solution(EDM(), z[i], mu=MU + w * (0.1 - MU))).abs().max() <= 1e-5
    never = fastdiff.Guide(5.0, null_label=2, interval=(1e3, 2e3))
    plain = fastdiff.sample(model, seeds=seeds, labels=1, **request)
    torch.testing.assert_close(fastdiff.sample(model, seeds=seeds, labels=1, guidance=never, **request), plain)
    wide = fastdiff.sample(wrapped(EDM(), mu=2.0), seeds=seeds, threshold=1.0, **request)
    assert wide.abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_torchdiffeq(method):
    """Its methods, one sample at a time, and ours: the same solution; with about as many evaluations."""
    odeint = pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed: pip install 'fastdiff[ode]'").odeint
    model, seeds = wrapped(EDM()), [1, 2]
    request = {"sampler": "rk45", "clip_output": False, "rtol": 1e-5, "atol": 1e-5, "dtype": torch.float64}
    got = fastdiff.run(model, seeds=seeds, method=method, **request)
    z = ops.philox_normal(ops.seed_tensor(seeds), 0, model.shape).double() * 80
    assert (got.images - solution(EDM(), z)).abs().max() <= 1e-3
    if method == "dopri5":
        for k in range(2):
            calls = []

            def slope(u, y, calls=calls):
                calls.append(u)
                r = math.exp(float(u))
                return y - (MU + STD**2 / (STD**2 + r**2) * (y - MU))

            span = torch.tensor([math.log(80.0), math.log(0.002)], dtype=torch.float64)
            y = odeint(slope, z[k], span, rtol=1e-5, atol=1e-5, method="dopri5")[-1]
            assert (y - got.images[k]).abs().max() <= 1e-3 and got.plan.counts[k] <= 1.15 * len(calls)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"nfe": 10}, RuntimeError, "rk45: a sample needs more than 10 evaluations; loosen rtol and atol"),
        ({"nfe": 0}, ValueError, "nfe: 0 is no bound on rk45's evaluations"),
        ({"rtol": -1.0}, ValueError, "rtol, atol: -1.0"),
        ({"method": "euler"}, ValueError, "method: 'euler' is not known; use one of dopri5, dopri8"),
        ({"eta": 1.0}, TypeError, "eta: sampler 'rk45' has no such option; it has rtol, atol, method, t_start, t_end"),
        ({"callback": print}, ValueError, "callback, trajectory, mask: rk45 takes other steps for each image"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        fastdiff.sample(wrapped(EDM()), **{"seeds": [0], "sampler": "rk45"} | options)

"""The adaptive solver: tolerance kept on exact data, samples independent, evaluations counted, recorded runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdiff import Denoiser, Prediction, samplers
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

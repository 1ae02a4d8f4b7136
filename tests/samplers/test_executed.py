"""Every sampler through the loop and its fused ops, against its rows carried out by hand on the same noise."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import Prediction, ops
from fastdiff.plan import execute
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules import DDPM, EDM, VE, VP

SHAPE, SEEDS = (3, 5, 7), [3, 1 << 63]  # odd sizes: 105 elements, no multiple of Philox's four
CHAIN, STATISTICS = (
    {"analytic-ddpm", "fast-ddpm", "lcm", "watson", "ddpm"},
    {
        "analytic-ddpm": {"gamma": np.full(1000, 0.9)},
        "watson": {"mse": np.linspace(0.1, 1, 1000)},
    },
)
SDES = {"ancestral", "annealed-langevin", "euler-maruyama", "predictor-corrector", "reverse-diffusion"}


class Network:
    """The mixture's network in the prediction's own terms, in x's precision; takes its time from the plan."""

    def __init__(self, plan, data):
        self.plan, self.data, self.calls = plan, data, 0

    def __call__(self, x, c_noise):
        t, p, schedule = self.plan.times[self.calls], self.plan.prediction, self.plan.schedule
        self.calls += 1
        c = p.coefficients(schedule, t)
        x64 = x.double() / float(c.c_in)
        d = self.data.denoise(x64, float(schedule.alpha(t)), float(schedule.sigma(t)))
        return ((d - float(c.c_skip) * x64) / float(c.c_out)).to(x.dtype)


@pytest.mark.parametrize("kind", ["edm", "v"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "san-roman"])  # times of its own: test_san_roman.py
def test_executed(name, kind, make_mixture, replay, philox):
    """In float64 to 1e-10; in float32 to four times what the same rows lose in plain float32, as test_textbook has it."""
    schedule = DDPM() if name in CHAIN else VE() if name in SDES else EDM() if kind == "edm" else VP()
    nfe = {"pndm": 21, "restart": 35}.get(name, 22 if name in ("predictor-corrector", "annealed-langevin") else 15)
    plan = SAMPLERS[name](schedule, Prediction(kind), nfe, **STATISTICS.get(name, {}))
    data, seeds = make_mixture(), ops.seed_tensor(SEEDS)
    start, z = ops.philox_normal(seeds, 0, SHAPE), philox(seeds, SHAPE)
    truth = replay(plan, data, start, z)
    size = max(1.0, truth.abs().max().item())
    plain = (replay(plan, data, start, z, dtype=torch.float32) - truth).abs().max().item()
    tolerances = {torch.float64: 1e-10 * size, torch.float32: 4 * plain + 16 * size * torch.finfo(torch.float32).eps}
    for dtype, tolerance in tolerances.items():
        network = Network(plan, data)
        with torch.inference_mode():
            got = execute(plan, network, seeds, SHAPE, dtype=dtype)
        assert network.calls == plan.nfe and got.dtype == dtype
        assert (got - truth).abs().max() <= tolerance, (plain, tolerance)


@pytest.mark.parametrize("name", ["unipc", "deis", "sde-dpm-solver++3m", "pndm", "restart", "predictor-corrector"])
def test_batches_and_order_do_not_matter(name, make_mixture):
    """The same seeds in batches of 1, 3, 16 and 64, forwards and backwards: the same images to the bit, noise included."""
    schedule = VE() if name == "predictor-corrector" else EDM()
    data = make_mixture((0.7, 0.3), (0.5, -0.5), (0.2, 0.1), per_pixel=True)

    def net(x, t):
        return data.denoise(x, 1.0, float(t[0]))

    model = fastdiff.wrap(net, schedule=schedule, prediction="x0", shape=SHAPE)
    nfe = {"pndm": 15, "restart": 35, "predictor-corrector": 20}.get(name, 12)
    request = {"sampler": name, "clip_output": False, "progress": False}
    whole = fastdiff.sample(model, nfe, seeds=range(20), batch_size=64, **request)
    for size in (1, 3, 16):
        assert torch.equal(fastdiff.sample(model, nfe, seeds=range(20), batch_size=size, **request), whole)
    assert torch.equal(fastdiff.sample(model, nfe, seeds=reversed(range(20)), batch_size=7, **request).flip(0), whole)

"""Plans against the schedulers of the installed diffusers, step by step on the same noise, beside those that pipelines use.

tests/checkpoints/test_pipelines.py has DDPM, DDIM, PNDM, DPMSolverMultistep, UniPC, DEIS, Euler, EulerAncestral, Heun, LMS
and CM through `of_scheduler`. Here are those that are asked for by a sampler's own options. diffusers computes in float32.
"""

import sys

import numpy as np
import pytest
import torch

from fastdiff import Prediction, samplers
from fastdiff.schedules import DDPM, EDM, Flow

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -e '.[test]'")

SHAPE = (2, 3, 4, 4)
EPS, F, FLOW = Prediction("eps", raw=True), Prediction("edm"), Prediction("flow", raw=True)
LINEAR = DDPM()
LATENT = DDPM(1000, 0.00085, 0.012, "scaled_linear")
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
EDM_LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
ZERO = EDM(1e-3, 200.0)  # sigma / alpha itself is the time, for grids between the chain's steps


class Run:
    """A scheduler carried out on the mixture: levels sigma / alpha of the evaluations, the draws and the end state."""

    def __init__(self, scheduler, steps, data, monkeypatch, **step):
        self.draws: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(3)

        def randn(shape, generator_=None, **_):
            self.draws.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float64))
            return self.draws[-1].float()

        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", randn, raising=False)
        scheduler.set_timesteps(steps)
        self.z = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        self.start = float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0
        x, self.ratios, self.times = (self.start * self.z).float(), [], []
        for t in scheduler.timesteps:
            shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output, ratio = self.network(scheduler, data, x.double(), shown.double(), t)
            self.ratios.append(ratio)
            self.times.append(float(t))
            x = scheduler.step(output.float(), t, x, **step, return_dict=False)[0]
        self.x = x.double()

    def network(self, scheduler, data, x, shown, t):
        """What the scheduler expects of its network, and sigma / alpha there."""
        name = type(scheduler).__name__
        index = getattr(scheduler, "step_index", None) or 0
        if "FlowMatch" in name:
            s = float(scheduler.sigmas[index])
            return (x - data.denoise(x, 1 - s, s)) / s, np.inf if s == 1 else s / (1 - s)
        if name.startswith("EDM"):
            s = float(scheduler.sigmas[index])
            c_in = 1 / np.sqrt(s**2 + 0.25)
            d = data.denoise(x, 1.0, s)
            skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / np.sqrt(s**2 + 0.25)
            assert torch.allclose(shown, c_in * x, rtol=1e-5)
            return (d - skip * x) / out, s
        if hasattr(scheduler, "sigmas") and getattr(scheduler, "sigmas_interpol", None) is not None:
            # KDPM2 divides by sqrt(1 + sigma^2) of the level that it looks at
            between = scheduler.sigmas_interpol[index - ("Ancestral" in name)]
            sigma = scheduler.sigmas[index] if scheduler.state_in_first_order else between
            r = float(sigma)
            d = data.denoise(x, 1.0, r)
            return (x - d) / r, r
        abar = float(scheduler.alphas_cumprod[int(t)])
        a, s = np.sqrt(abar), np.sqrt(1 - abar)
        return (x - a * data.denoise(x, a, s)) / s, s / a


def single(order, solver, **more):
    return lambda r: samplers.dpm_solver_single(
        LINEAR, EPS, len(r.times), order=order, estimate="x0", solver=solver, inner="grid", times=r.times, **more
    )


# name -> scheduler, steps, our plan from the run
CASES = {
    # Its "midpoint" third order makes the second stage by its second order's rule, with phi_1 / 2; "heun" is "taylor".
    "singlestep-1": ("DPMSolverSinglestep", BETAS | {"solver_order": 1}, 8, single(1, "dpmsolver")),
    "singlestep-2": ("DPMSolverSinglestep", BETAS | {"solver_order": 2}, 9, single(2, "dpmsolver")),
    "singlestep-2-heun": ("DPMSolverSinglestep", BETAS | {"solver_order": 2, "solver_type": "heun"}, 9, single(2, "taylor")),
    "singlestep-3-heun": (
        "DPMSolverSinglestep",
        BETAS | {"solver_order": 3, "solver_type": "heun"},
        10,
        single(3, "taylor"),
    ),
    "kdpm2": (
        "KDPM2Discrete",
        BETAS,
        8,
        lambda r: samplers.midpoint(ZERO, EPS, 15, mean="geometric", times=r.ratios[::2]),
    ),
    "kdpm2-ancestral": (
        "KDPM2AncestralDiscrete",
        BETAS,
        8,
        lambda r: samplers.two_stage_ancestral(ZERO, EPS, 15, rule="dpm2", times=r.ratios[::2]),
    ),
    "edm-euler": ("EDMEuler", EDM_LEVELS, 10, lambda r: samplers.euler(EDM(), F, 10)),
    "edm-dpm-2": ("EDMDPMSolverMultistep", EDM_LEVELS, 10, lambda r: samplers.dpm_solver_multi(EDM(), F, 10)),
    "edm-dpm-3": (
        "EDMDPMSolverMultistep",
        EDM_LEVELS | {"solver_order": 3},
        16,
        lambda r: samplers.dpm_solver_multi(EDM(), F, 16, order=3, solver="dpmsolver", lower_order_final=False),
    ),
    "edm-dpm-sde": (
        "EDMDPMSolverMultistep",
        EDM_LEVELS | {"algorithm_type": "sde-dpmsolver++"},
        10,
        lambda r: samplers.dpm_solver_multi(EDM(), F, 10, eta=1.0),
    ),
    # Its chain is Stable Diffusion's by default.
    "lcm": ("LCM", {}, 4, lambda r: samplers.lcm(LATENT, EPS, 4, times=r.times)),
    "flow-euler": (
        "FlowMatchEulerDiscrete",
        {},
        8,
        lambda r: samplers.ddim(
            Flow(t_max=1.0), FLOW, 8, times=[1 / (1 + 1 / q) if np.isfinite(q) else 1.0 for q in r.ratios]
        ),
    ),
    "flow-euler-shifted": (
        "FlowMatchEulerDiscrete",
        {"shift": 3.0},
        8,
        lambda r: samplers.ddim(
            Flow(t_max=1.0), FLOW, 8, times=[1 / (1 + 1 / q) if np.isfinite(q) else 1.0 for q in r.ratios]
        ),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_scheduler(name, make_mixture, replay, monkeypatch):
    """The levels of all evaluations, and the images, to what float32 leaves of them."""
    scheduler, settings, steps, make = CASES[name]
    data = make_mixture()
    run = Run(getattr(diffusers, f"{scheduler}Scheduler")(**settings), steps, data, monkeypatch)
    plan = make(run)
    ours = [float(plan.schedule.ratio(t)) for t in plan.times]
    np.testing.assert_allclose(np.arctan(ours), np.arctan(run.ratios), rtol=2e-6, atol=2e-6)
    z = run.z * run.start / plan.prior_std  # they begin with sqrt(1 + sigma^2) where we begin with sigma
    got = replay(plan, data, z, lambda k: run.draws[k])
    assert (got - run.x).abs().max() <= 1e-4

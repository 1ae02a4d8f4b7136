"""Plans against recorded runs of other people's samplers (tests/data/samplers/README.md), on their noise.

EDM's ablation runs step in t rather than in sigma / alpha or on other grids, which no plan here does; they are not used.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdiff import Prediction, ops, samplers
from fastdiff.plan import execute
from fastdiff.schedules import DDPM, EDM, VP

EPS, F = Prediction("eps", raw=True), Prediction("edm")
LINEAR, COSINE = DDPM(), DDPM(law="cosine")
CHURN = {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}

# case -> plan, float64 tolerance. Guided diffusion rounds its coefficients to float32 at every use; the others ran in
# float64 throughout, and 1e-9 is far above our rounding and far below any change of formula.
CASES = {
    "edm/heun_n18": (lambda: samplers.heun(EDM(), F, 35), 1e-9),
    "edm/heun_n5": (lambda: samplers.heun(EDM(), F, 9), 1e-9),
    "edm/churn_n16": (lambda: samplers.heun(EDM(), F, 31, **CHURN), 1e-9),
    "cm/heun_n18": (lambda: samplers.heun(EDM(), F, 35), 1e-9),
    "cm/heun_churn_n10": (lambda: samplers.heun(EDM(), F, 19, **CHURN), 1e-9),
    "cm/karras_sample_heun_clip_n10": (lambda: samplers.heun(EDM(), F, 19, clip=True), 1e-9),
    "cm/euler_n18": (lambda: samplers.euler(EDM(), F, 18), 1e-9),
    "guided/ddim50_linear_clip": (lambda: samplers.ddim(LINEAR, EPS, 50, clip=True), 3e-6),
    "guided/ddim50_linear_noclip": (lambda: samplers.ddim(LINEAR, EPS, 50), 3e-6),
    "guided/ddim50_cosine_clip": (lambda: samplers.ddim(COSINE, EPS, 50, clip=True), 4e-6),
    "guided/ddim50_cosine_noclip": (lambda: samplers.ddim(COSINE, EPS, 50), 4e-6),
    "guided/ddim50_linear_eta1_noclip": (lambda: samplers.ddim(LINEAR, EPS, 50, eta=1.0), 8e-6),
    **{
        f"guided/p_{law}_{variance}_{'clip' if clip else 'noclip'}_50": (
            lambda s=schedule, v=variance, c=clip: samplers.ddpm(s, EPS, 50, variance=v, clip=c),
            1e-6,
        )
        for law, schedule in (("linear", LINEAR), ("cosine", COSINE))
        for variance in ("large", "small")
        for clip in (True, False)
    },
    "score_sde/vp_em_n50": (lambda: samplers.euler_maruyama(VP(), EPS, 50), 1e-9),
}
CONSISTENCY = {
    "cm/multistep_ts0_22_39": False,
    "cm/karras_sample_onestep": True,
    "cm/karras_sample_multistep_clip": True,
}


@pytest.fixture(scope="module")
def recorded():
    return load_file(Path(__file__).parents[1] / "data" / "samplers" / "peers.safetensors")


def start(recorded, plan):
    """Their x at the start in units of our prior: the variance-preserving ones start from deviation 1, not sigma(t)."""
    ve = isinstance(plan.schedule, EDM)
    return recorded["z"].double() * (1.0 if ve else 1 / plan.prior_std)


@pytest.mark.parametrize("name", CASES)
def test_peer(name, recorded, make_mixture, replay):
    make, tolerance = CASES[name]
    plan = make()
    times = recorded[f"{name}/eval_t"].numpy()
    # score SDE labels its steps 999 t
    np.testing.assert_allclose(np.array(plan.times) * (999 if "score_sde" in name else 1), times, rtol=1e-9)
    got = replay(plan, make_mixture(), start(recorded, plan), lambda draw: recorded["noise"][draw])
    got = got.clamp(-1, 1) if "karras_sample" in name else got
    assert (got - recorded[f"{name}/x_final"]).abs().max() <= tolerance


@pytest.mark.parametrize("name", CONSISTENCY)
def test_peer_consistency(name, recorded, make_mixture, replay):
    clip = CONSISTENCY[name]
    times = recorded[f"{name}/eval_t"].numpy()
    # Of kind "consistency" for its noise, sqrt(t^2 - t_min^2); their D is the mixture's own.
    plan = samplers.consistency(EDM(), Prediction("consistency"), len(times), times=times, clip=clip)
    got = replay(plan, make_mixture(), recorded["z"], lambda draw: recorded["noise"][draw])
    got = got.clamp(-1, 1) if clip else got
    assert (got - recorded[f"{name}/x_final"]).abs().max() <= 1e-9


@pytest.mark.parametrize(
    "name", ["edm/heun_n18", "cm/euler_n18", "guided/ddim50_linear_noclip", "guided/ddim50_cosine_clip"]
)
def test_peer_executed(name, recorded, make_mixture, make_oracle):
    """The deterministic ones through `execute`: float32 state, the fused op. 2e-6: what the peers' own float32 runs lose."""
    make, tolerance = CASES[name]
    plan = make()
    oracle = make_oracle(plan, make_mixture())
    with torch.inference_mode():
        got = execute(plan, oracle, ops.seed_tensor(range(4)), (3, 8, 8), x_T=start(recorded, plan))
    assert (got - recorded[f"{name}/x_final"]).abs().max() <= tolerance + 2e-6

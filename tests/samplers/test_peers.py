"""Plans against recorded runs of other people's samplers (tests/data/samplers/README.md), on their noise and grids.

Each test compares the levels of all evaluations and the final state. Where a peer has a quirk, its entry says which.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdiff import Prediction, ops, samplers
from fastdiff.plan import execute
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow

EPS, F = Prediction("eps", raw=True), Prediction("edm")
LINEAR, COSINE = DDPM(), DDPM(law="cosine")
CHURN = {"S_churn": 40.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
K = EDM(sigma_min=0.01)
WIDE = EDM(sigma_min=0.001, sigma_max=160.0)  # for grids that reach beyond EDM's own


# case -> plan from the recorded run r (grid, eval_t)
CASES = {
    # NVlabs/edm. Its ablation sampler steps in t of the schedule it imitates, so that its last step is not D.
    "edm/heun_n18": lambda r: samplers.heun(EDM(), F, 35),
    "edm/heun_n5": lambda r: samplers.heun(EDM(), F, 9),
    "edm/churn_n16": lambda r: samplers.heun(EDM(), F, 31, **CHURN),
    "edm/ablation_edm_alpha05_n8": lambda r: samplers.midpoint(EDM(), F, 15),
    "edm/ablation_iddpm_heun_n12": lambda r: samplers.heun(WIDE, F, 23, times=r["grid"]),
    "edm/ablation_ve_euler_n18": lambda r: samplers.euler(WIDE, F, 18, times=r["grid"], variable="variance"),
    "edm/ablation_vp_euler_n18": lambda r: samplers.euler(VP(), EPS, 18, times=np.linspace(1, 1e-3, 18), variable="time"),
    "edm/ablation_vp_heun_n10": lambda r: samplers.heun(VP(), EPS, 19, times=np.linspace(1, 1e-3, 10), variable="time"),
    # openai/consistency_models. Multistep's noise is sqrt(t^2 - t_min^2); their D is the mixture's own.
    "cm/heun_n18": lambda r: samplers.heun(EDM(), F, 35),
    "cm/heun_churn_n10": lambda r: samplers.heun(EDM(), F, 19, **CHURN),
    "cm/karras_sample_heun_clip_n10": lambda r: samplers.heun(EDM(), F, 19, clip=True),
    "cm/euler_n18": lambda r: samplers.euler(EDM(), F, 18),
    "cm/dpm_n10": lambda r: samplers.midpoint(EDM(), F, 20, mean="cubic"),
    "cm/euler_ancestral_n18": lambda r: samplers.euler_ancestral(EDM(), F, 18),
    "cm/karras_sample_progdist_n8": lambda r: samplers.euler(EDM(), F, 8, to_zero=False, clip=True),
    "cm/multistep_ts0_22_39": lambda r: samplers.consistency(EDM(), BOUNDARY, 2, times=r["eval_t"]),
    "cm/karras_sample_onestep": lambda r: samplers.consistency(EDM(), BOUNDARY, 1, clip=True),
    "cm/karras_sample_multistep_clip": lambda r: samplers.consistency(EDM(), BOUNDARY, 3, times=r["eval_t"], clip=True),
    # crowsonkb/k-diffusion
    "k-diffusion/euler_n10": lambda r: samplers.euler(K, F, 10),
    "k-diffusion/euler_churn_n10": lambda r: samplers.euler(K, F, 10, **CHURN | {"S_churn": 5.0}),
    "k-diffusion/heun_n10": lambda r: samplers.heun(K, F, 19),
    "k-diffusion/heun_churn_n10": lambda r: samplers.heun(K, F, 19, **CHURN),
    "k-diffusion/dpm_2_n10": lambda r: samplers.midpoint(K, F, 19, mean="geometric"),
    "k-diffusion/lms_n10": lambda r: samplers.lms(K, F, 10),
    "k-diffusion/lms_vp_order3_n15": lambda r: samplers.lms(WIDE, F, 15, order=3, times=r["grid"][:-1]),
    "k-diffusion/dpmpp_2m_n10": lambda r: samplers.dpm_solver_multi(K, F, 10, lower_order_final=False),
    "k-diffusion/dpmpp_2m_exponential_n12": lambda r: samplers.dpm_solver_multi(
        K, F, 11, spacing="logsnr", to_zero=False, lower_order_final=False
    ),
    "k-diffusion/euler_ancestral_n10": lambda r: samplers.euler_ancestral(K, F, 10),
    "k-diffusion/dpm_2_ancestral_n10": lambda r: samplers.two_stage_ancestral(K, F, 19, rule="dpm2"),
    "k-diffusion/dpmpp_2s_ancestral_n10": lambda r: samplers.two_stage_ancestral(K, F, 19),
    "k-diffusion/dpmpp_sde_n10": lambda r: samplers.dpm_solver_sde(K, F, 19),
    "k-diffusion/dpmpp_2m_sde_midpoint_n10": lambda r: samplers.dpm_solver_multi(K, F, 10, eta=1.0, lower_order_final=False),
    "k-diffusion/dpmpp_2m_sde_heun_n10": lambda r: samplers.dpm_solver_multi(
        K, F, 10, eta=1.0, solver="taylor", lower_order_final=False
    ),
    # Half of the second difference: k-diffusion's third order converges with the second (test_order.py).
    "k-diffusion/dpmpp_3m_sde_n10": lambda r: samplers.dpm_solver_multi(
        K, F, 10, order=3, eta=1.0, solver="k-diffusion", lower_order_final=False
    ),
    # openai/guided-diffusion rounds its coefficients to float32 at every use.
    "guided/ddim50_linear_clip": lambda r: samplers.ddim(LINEAR, EPS, 50, clip=True),
    "guided/ddim50_linear_noclip": lambda r: samplers.ddim(LINEAR, EPS, 50),
    "guided/ddim50_cosine_clip": lambda r: samplers.ddim(COSINE, EPS, 50, clip=True),
    "guided/ddim50_cosine_noclip": lambda r: samplers.ddim(COSINE, EPS, 50),
    "guided/ddim50_linear_eta1_noclip": lambda r: samplers.ddim(LINEAR, EPS, 50, eta=1.0),
    **{
        f"guided/p_{law}_{variance}_{'clip' if clip else 'noclip'}_50": (
            lambda r, s=schedule, v=variance, c=clip: samplers.ddpm(s, EPS, 50, variance=v, clip=c)
        )
        for law, schedule in (("linear", LINEAR), ("cosine", COSINE))
        for variance in ("large", "small")
        for clip in (True, False)
    },
    # Sections of the chain, evenly respaced each. Its log-variance of the last noise is that of the step after it.
    "guided/p_cosine_T4000_rescale_sections": lambda r: samplers.ddpm(
        DDPM(T=4000, law="cosine"), EPS, 25, variance="small", sections=(10, 8, 7)
    ),
    # LuChengTHU/dpm-solver. Lower orders at the end below 10 steps (its documentation says 15).
    **{
        f"dpm-solver/multi{'pp' if pp else ''}_o{order}_{skip}": (
            lambda r, p=pp, o=order, n=n: samplers.dpm_solver_multi(
                VP(),
                EPS,
                n,
                order=o,
                estimate="x0" if p else "eps",
                solver="dpmsolver",
                times=r["grid"],
                to_zero=False,
                lower_order_final=n < 10,
            )
        )
        for pp in (False, True)
        for order in (1, 2, 3)
        for skip, n in (("logsnr_n8", 8), ("time_n12", 12))
    },
    "dpm-solver/multipp_o2_taylor_time_n10": lambda r: samplers.dpm_solver_multi(
        VP(), EPS, 10, solver="taylor", times=r["grid"], to_zero=False, lower_order_final=False
    ),
    "dpm-solver/multipp_o2_discrete_linear_n10_d0": lambda r: samplers.dpm_solver_multi(
        LINEAR, EPS, 11, times=r["eval_t"], lower_order_final=False
    ),
    "dpm-solver/single_o3_logsnr_n12": lambda r: samplers.dpm_solver_single(VP(), EPS, 12, spacing="logsnr", to_zero=False),
    "dpm-solver/singlepp_o2_time_n9": lambda r: samplers.dpm_solver_single(
        VP(),
        EPS,
        9,
        order=2,
        estimate="x0",
        inner="time",
        times=[*r["eval_t"][::2], 1e-3],
        to_zero=False,
    ),
    # yang-song/score_sde_pytorch
    "guided/p_linear_learnedrange_v03_50": lambda r: samplers.ddpm(LINEAR, EPS, 50, variance="learned"),
    "score_sde/vp_em_n50": lambda r: samplers.euler_maruyama(VP(), EPS, 50),
    "score_sde/vp_revdiff_n50": lambda r: samplers.reverse_sde(VP(), EPS, 50),
    "score_sde/vp_ancestral_n50": lambda r: samplers.reverse_sde(VP(), EPS, 50, predictor="ancestral"),
    "score_sde/ve_ancestral_n50": lambda r: samplers.reverse_sde(VE(), EPS, 50, predictor="ancestral"),
    "score_sde/ve_pf_revdiff_n50": lambda r: samplers.reverse_sde(VE(), EPS, 50, probability_flow=True),
    "score_sde/vp_ald_n20_nodenoise": lambda r: samplers.reverse_sde(VP(), EPS, 40, corrector="ald", denoise=False),
    # Langevin's step from norms averaged over the batch: the images depend on one another.
    "score_sde/ve_pc_revdiff_langevin_n50": lambda r: samplers.reverse_sde(
        VE(), EPS, 100, corrector="langevin", norms="batch"
    ),
    "score_sde/vp_pc_em_langevin_n20": lambda r: samplers.reverse_sde(
        VP(), EPS, 40, predictor="euler-maruyama", corrector="langevin", norms="batch"
    ),
    # Hugging Face diffusers, float32 throughout.
    "diffusers/ddim_n10": lambda r: samplers.ddim(LINEAR, EPS, 10),
    "diffusers/ddim_clip_eta1_n10": lambda r: samplers.ddim(LINEAR, EPS, 10, eta=1.0, spacing="trailing", clip=True),
    "diffusers/ddpm_n10": lambda r: samplers.ddpm(LINEAR, EPS, 10, variance="small", spacing="uniform", clip=False),
    # It adds noise wherever t > 0: with trailing spacing in the step to the image too.
    "diffusers/ddpm_clip_large_n10": lambda r: samplers.ddpm(LINEAR, EPS, 10, spacing="trailing", denoise=False),
    "diffusers/euler_n10": lambda r: samplers.euler(LINEAR, EPS, 10, times=r["eval_t"]),
    "diffusers/heun_n10": lambda r: samplers.heun(LINEAR, EPS, 19, times=r["eval_t"][::2]),
    "diffusers/euler_karras_n10": lambda r: samplers.euler(EDM(1e-3, 200.0), EPS, 10, times=r["grid"][:-1]),
    "diffusers/dpmpp_2m_n10": lambda r: samplers.dpm_solver_multi(LINEAR, EPS, 10, times=r["eval_t"]),
    "diffusers/dpmpp_2m_sde_n10": lambda r: samplers.dpm_solver_multi(LINEAR, EPS, 10, eta=1.0, times=r["eval_t"]),
    "diffusers/dpmpp_3m_karras_n10": lambda r: samplers.dpm_solver_multi(
        EDM(1e-3, 200.0), EPS, 10, order=3, solver="dpmsolver", times=r["grid"][:-1]
    ),
    "diffusers/dpmsolver_2m_sigmamin_n10": lambda r: samplers.dpm_solver_multi(
        LINEAR, EPS, 10, estimate="eps", times=[*r["eval_t"], 0.0], to_zero=False
    ),
    "diffusers/deis_n10": lambda r: samplers.deis(LINEAR, EPS, 10, order=2, times=[*r["eval_t"], 0.0], to_zero=False),
    "diffusers/deis_o3_n10": lambda r: samplers.deis(LINEAR, EPS, 10, times=[*r["eval_t"], 0.0], to_zero=False),
    "diffusers/unipc_bh1_o3_n10": lambda r: samplers.unipc(
        LINEAR, EPS, 10, order=3, B="bh1", times=[*r["eval_t"], 0.0], to_zero=False
    ),
    "diffusers/unipc_bh2_n10": lambda r: samplers.unipc(LINEAR, EPS, 10, times=r["eval_t"]),
    # Its last evaluation, at t = 0, goes from t = 0 to t = 0: one evaluation more than there is need for.
    "diffusers/pndm_n10": lambda r: samplers.pndm(LINEAR, EPS, 18, times=np.arange(900, -1, -100), to_zero=False),
    "diffusers/pndm_skipprk_n10": lambda r: samplers.pndm(
        LINEAR, EPS, 10, warmup="heun", times=np.arange(900, -1, -100), to_zero=False
    ),
    "diffusers/cm_n10": lambda r: samplers.consistency(EDM(), BOUNDARY, 10, times=r["eval_sigma"]),
    "diffusers/cm_ts0_22": lambda r: samplers.consistency(EDM(), BOUNDARY, 2, times=r["eval_sigma"], clip=True),
    "diffusers/flow_euler_n10": lambda r: samplers.ddim(Flow(t_max=1.0), FLOW, 10, times=r["eval_sigma"]),
    "diffusers/flow_euler_shift3_n10": lambda r: samplers.ddim(Flow(t_max=1.0), FLOW, 10, times=r["eval_sigma"]),
    "diffusers/lcm_n4": lambda r: samplers.lcm(DDPM(1000, 0.00085, 0.012, "scaled_linear"), EPS, 4, times=r["eval_t"]),
}
BOUNDARY, FLOW = Prediction("consistency"), Prediction("flow", raw=True)
WASTED = {"diffusers/pndm_n10", "diffusers/pndm_skipprk_n10"}


@pytest.fixture(scope="module")
def peers():
    return load_file(Path(__file__).parents[1] / "data" / "samplers" / "peers.safetensors")


def start(peers, name, plan):
    """Their first state in units of our prior: same y = x / alpha, whatever coordinates and deviation they begin with."""
    if name.startswith("edm"):
        return peers["z"].double()
    alpha = peers[f"{name}/eval_alpha"][0].item()
    factor = float(plan.schedule.alpha(plan.times[0])) / alpha if alpha else 1.0
    return peers["z"].double() * peers[f"{name}/start"] * factor / plan.prior_std


def bank(peers, name, plan):
    """noise(draw): the recorded run's."""
    n = len(peers[f"{name}/x_final"])
    if f"{name}/brownian" not in peers:
        return lambda draw: peers["noise"][draw, :n]
    recorded = peers[f"{name}/brownian"].double()
    if "dpmpp_sde" not in name:
        return lambda draw: recorded[draw]
    levels = [t for t in plan.times]

    def parts(draw):
        """They record the increments of [r, middle] and [r, r']; ours are of [r, middle] and [middle, r']."""
        i = draw // 2
        now, middle, then = levels[2 * i], levels[2 * i + 1], levels[2 * i + 2]
        part, whole = recorded[2 * i], recorded[2 * i + 1]
        if draw % 2 == 0:
            return part
        return (whole * np.sqrt(now - then) - part * np.sqrt(now - middle)) / np.sqrt(middle - then)

    return parts


@pytest.mark.parametrize("name", CASES)
def test_peer(name, peers, make_mixture, replay):
    recorded = {k.split("/")[-1]: v.numpy() for k, v in peers.items() if k.startswith(f"{name}/")}
    plan = CASES[name](recorded)
    alpha, sigma = recorded["eval_alpha"], recorded["eval_sigma"]
    ours = [float(plan.schedule.sigma(t)) for t in plan.times], [float(plan.schedule.alpha(t)) for t in plan.times]
    float32 = name.startswith("diffusers")
    theirs = np.arctan2(sigma, alpha)[: -1 if name in WASTED else None]
    np.testing.assert_allclose(np.arctan2(*ours), theirs, rtol=1e-9, atol=2e-6 if float32 else 0)
    n = len(recorded["x_final"])
    got = replay(plan, make_mixture(), start(peers, name, plan)[:n], bank(peers, name, plan), V=0.3).numpy()
    got = got.clip(-1, 1) if "karras_sample" in name or name == "diffusers/cm_ts0_22" else got
    assert np.abs(got - recorded["x_final"]).max() <= recorded["atol"].item()


@pytest.mark.parametrize(
    "name", ["edm/heun_n18", "cm/euler_n18", "guided/ddim50_linear_noclip", "guided/ddim50_cosine_clip"]
)
def test_peer_executed(name, peers, make_mixture, make_oracle):
    """Through `execute`: float32 state, the fused op. 2e-6: what the peers' own float32 runs lose."""
    plan = CASES[name]({})
    oracle = make_oracle(plan, make_mixture())
    with torch.inference_mode():
        got = execute(plan, oracle, ops.seed_tensor(range(2)), (3, 8, 8), x_T=start(peers, name, plan)[:2])
    assert (got - peers[f"{name}/x_final"]).abs().max() <= peers[f"{name}/atol"] + 2e-6

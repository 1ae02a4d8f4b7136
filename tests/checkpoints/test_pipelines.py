"""fastdiff.sample(pipe, nfe) gives the images of pipe(num_inference_steps): diffusers' own pipelines and schedulers.

The same noise: what diffusers drew is passed as noise=[...]. 1e-4 on images in [0, 1].
"""

import json
import sys
import warnings

import pytest
import torch

import fastdiff
from fastdiff import CheckpointError
from fastdiff.samplers.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -e '.[test]'")

LIMIT = 1e-4
NETWORK = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# A random network's noise is amplified by 1 / alpha: a mild schedule keeps most pixels within [-1, 1], where they count.
MILD = {"beta_start": 1e-4, "beta_end": 0.002}
SAMPLE, V = {"prediction_type": "sample"}, {"prediction_type": "v_prediction"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**NETWORK).eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() == 1:
            p.add_(0.1 * torch.randn_like(p))
    net.conv_out.weight.mul_(0.5)
    return net


@pytest.fixture
def draws(monkeypatch):
    """Everything that diffusers draws."""
    noted: list[torch.Tensor] = []

    def randn(shape, generator=None, device=None, dtype=None, layout=None):
        noted.append(torch.randn(tuple(shape), generator=generator))
        return noted[-1]

    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and "randn_tensor" in vars(module):
            monkeypatch.setattr(module, "randn_tensor", randn)
    return noted


def images(pipe, steps, **arguments):
    """Of pipe itself, float32 [2, 3, 8, 8] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    result = pipe(2, generator=generator, num_inference_steps=steps, output_type="np", **arguments).images
    return torch.from_numpy(result).permute(0, 3, 1, 2)


def agree(got, expected, inside=0.2):
    assert float(((expected > 0) & (expected < 1)).float().mean()) > inside  # pixels that the clamp leaves alone
    assert float(((got + 1) / 2 - expected).abs().max()) <= LIMIT


CASES = {
    "ddpm": ("DDPM", {}, {}),
    "ddpm large trailing": ("DDPM", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {}),
    "ddpm linspace": ("DDPM", {"timestep_spacing": "linspace", "variance_type": "fixed_small_log"}, {"steps": 7}),
    "ddpm offset unclipped v": ("DDPM", V | {"steps_offset": 1, "clip_sample": False}, {}),
    "ddpm sample cosine": ("DDPM", SAMPLE | COSINE, {}),
    "ddpm thresholding": ("DDPM", {"thresholding": True}, {}),
    "ddpm whole chain": ("DDPM", {"num_train_timesteps": 12}, {"steps": 12}),
    "ddim": ("DDIM", MILD, {}),
    "ddim eta 1": ("DDIM", MILD, {"eta": 1.0}),
    "ddim unclipped eta 0.5": ("DDIM", MILD | {"clip_sample": False}, {"eta": 0.5}),
    "ddim clipped output": ("DDIM", MILD, {"eta": 0.3, "use_clipped_model_output": True}),
    "ddim v": ("DDIM", V, {}),
    "ddim sample offset": ("DDIM", SAMPLE | {"steps_offset": 1}, {}),
    "ddim trailing, steps of 142": ("DDIM", MILD | {"timestep_spacing": "trailing"}, {"steps": 7}),
    "ddim linspace": ("DDIM", MILD | {"timestep_spacing": "linspace", "clip_sample": False}, {}),
    "ddim ends at alpha_0": ("DDIM", MILD | {"set_alpha_to_one": False}, {}),
    "ddim thresholding": ("DDIM", MILD | {"thresholding": True}, {}),
    "dpm-solver++": ("DPMSolverMultistep", MILD, {}),
    "dpm-solver++ v": ("DPMSolverMultistep", V, {"steps": 20}),
    "dpm-solver++ sample": ("DPMSolverMultistep", SAMPLE | {"solver_order": 1}, {}),
    "dpm-solver++ 3 karras": ("DPMSolverMultistep", MILD | {"solver_order": 3, "use_karras_sigmas": True}, {}),
    "dpm-solver++ 3 leading": (
        "DPMSolverMultistep",
        MILD | {"solver_order": 3, "timestep_spacing": "leading"},
        {"steps": 16},
    ),
    "dpm-solver++ heun": ("DPMSolverMultistep", MILD | {"solver_type": "heun", "timestep_spacing": "trailing"}, {}),
    "dpm-solver++ clipped": ("DPMSolverMultistep", MILD | {"thresholding": True}, {}),
    "dpm-solver++ cosine": ("DPMSolverMultistep", V | COSINE | {"lambda_min_clipped": -5.1}, {}),
    "dpm-solver++ sigma_min": ("DPMSolverMultistep", MILD | {"final_sigmas_type": "sigma_min"}, {}),
    "dpm-solver": (
        "DPMSolverMultistep",
        MILD | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {},
    ),
    "sde-dpm-solver++": ("DPMSolverMultistep", MILD | {"algorithm_type": "sde-dpmsolver++"}, {}),
    "sde-dpm-solver++ heun": ("DPMSolverMultistep", MILD | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    "pndm": ("PNDM", MILD, {"nfe": 18}),
    "pndm skip": ("PNDM", MILD | {"skip_prk_steps": True}, {}),
    "pndm skip offset": ("PNDM", MILD | {"skip_prk_steps": True, "steps_offset": 1}, {"nfe": 11}),
    "pndm trailing": ("PNDM", MILD | {"timestep_spacing": "trailing"}, {"nfe": 19}),
}


@pytest.mark.parametrize("name", CASES)
def test_pipelines(name, unet, draws):
    scheduler, settings, arguments = CASES[name]
    pipeline = getattr(diffusers, {"DDIM": "DDIMPipeline", "PNDM": "PNDMPipeline"}.get(scheduler, "DDPMPipeline"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline(unet, getattr(diffusers, f"{scheduler}Scheduler")(**settings))
    steps, nfe = arguments.pop("steps", 10), arguments.pop("nfe", None)
    expected = images(pipe, steps, **arguments)
    agree(fastdiff.sample(pipe, nfe=nfe or steps, seeds=[0, 1], noise=draws, **arguments), expected)


# Schedulers that need scale_model_input, which DDPMPipeline does not call; UniPC and DEIS take no generator, which it gives.
BY_HAND = {
    "unipc": ("UniPCMultistep", MILD, {}),
    "unipc 3 bh1": (
        "UniPCMultistep",
        MILD | {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {},
    ),
    "unipc trailing": ("UniPCMultistep", MILD | {"timestep_spacing": "trailing"}, {"steps": 7}),
    "unipc karras v": ("UniPCMultistep", V | {"use_karras_sigmas": True}, {}),
    "unipc eps": ("UniPCMultistep", MILD | {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {"steps": 16}),
    "deis": ("DEISMultistep", MILD, {}),
    "deis 3": ("DEISMultistep", MILD | {"solver_order": 3, "timestep_spacing": "leading"}, {"steps": 16}),
    "euler": ("EulerDiscrete", MILD, {}),
    "euler leading": ("EulerDiscrete", MILD | {"timestep_spacing": "leading", "steps_offset": 1}, {"steps": 7}),
    "euler karras": ("EulerDiscrete", MILD | {"use_karras_sigmas": True}, {}),
    "euler v between indices": ("EulerDiscrete", V, {"steps": 8}),
    "euler ancestral": ("EulerAncestralDiscrete", MILD, {}),
    "heun": ("HeunDiscrete", MILD, {"nfe": 19}),
    "heun clipped trailing": ("HeunDiscrete", MILD | {"clip_sample": True, "timestep_spacing": "trailing"}, {"nfe": 19}),
    "lms": ("LMSDiscrete", MILD, {}),
    "lms karras": ("LMSDiscrete", MILD | {"use_karras_sigmas": True}, {}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_schedulers(name, unet, draws):
    """The loop that diffusers documents for every scheduler."""
    kind, settings, arguments = BY_HAND[name]
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**settings)
    steps = arguments.get("steps", 10)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    start = x.clone()
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1)
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    agree(fastdiff.sample(pipe, nfe=arguments.get("nfe", steps), seeds=[0, 1], noise=[start, *draws]), expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
def test_consistency_pipeline(steps, clip, draws):
    torch.manual_seed(0)
    settings = NETWORK | {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}
    net = diffusers.UNet2DModel(**settings).eval()
    pipe = diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler(clip_denoised=clip))
    expected = images(pipe, steps, class_labels=[1, 3])
    agree(fastdiff.sample(pipe, nfe=steps, seeds=[0, 1], labels=[1, 3], noise=draws), expected)


def test_learned_variance(draws):
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**NETWORK | {"out_channels": 6}).eval()
    pipe = diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(variance_type="learned_range"))
    expected = images(pipe, 10)
    agree(fastdiff.sample(pipe, nfe=10, seeds=[0, 1], noise=draws), expected)


def test_through_files(unet, draws, tmp_path):
    """The pipeline's folder, and our own file made of it, keep the scheduler."""
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**MILD))
    expected = images(pipe, 10)
    pipe.save_pretrained(tmp_path / "pipe")
    model = fastdiff.load(tmp_path / "pipe")
    model.save(tmp_path / "ours.safetensors")
    for source in (tmp_path / "pipe", tmp_path / "ours.safetensors"):
        agree(fastdiff.sample(source, nfe=10, seeds=[0, 1], noise=draws), expected)
    assert fastdiff.make_plan(model, 10, "unipc").name == "unipc"  # a named sampler comes first


def test_own_noise(unet):
    """Without replay: the seeds' noise, whatever the batch."""
    pipe = diffusers.DDPMPipeline(unet, diffusers.DPMSolverMultistepScheduler(**MILD))
    both = fastdiff.sample(pipe, nfe=3, seeds=[3, 4])
    assert torch.equal(fastdiff.sample(pipe, nfe=3, seeds=[4])[0], both[1])


REFUSED = {
    "DPMSolverSinglestep": [{}],
    "LCM": [{}],
    "DDPM": [
        {"variance_type": "fixed_large_log"},
        {"clip_sample_range": 2.0},
        {"thresholding": True, "sample_max_value": 2},
    ],
    "PNDM": [V, {"set_alpha_to_one": True}, {"timestep_spacing": "linspace"}],
    "DPMSolverMultistep": [
        {"use_exponential_sigmas": True},
        {"use_lu_lambdas": True},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, **COSINE},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ],
    "UniPCMultistep": [{"disable_corrector": [0]}, {"lower_order_final": False}],
    "DEISMultistep": [{"thresholding": True}],
    "EulerDiscrete": [{"interpolation_type": "log_linear"}, {"final_sigmas_type": "sigma_min"}],
}


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, many in REFUSED.items() for s in many])
def test_what_is_refused(name, settings, unet):
    """A setting that no plan carries out is named, with the remedy; the schedule is read all the same."""
    pipe = diffusers.DDPMPipeline(unet, getattr(diffusers, f"{name}Scheduler")(**settings))
    with pytest.raises(ValueError, match=r"scheduler: .* not carried out here, .*name a sampler, such as sampler='unipc'"):
        fastdiff.sample(pipe, nfe=18, seeds=[0])
    assert fastdiff.sample(pipe, nfe=2, seeds=[0], sampler="unipc").shape == (1, 3, 8, 8)


def test_noise_conditional_pipeline():
    """NCSN++'s pipeline: the network and the scheduler's levels are read, its steps are not carried out."""
    settings = NETWORK | {"norm_num_groups": None, "time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5}
    settings |= {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "block_out_channels": (64, 128)}
    settings |= {"up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "attention_head_dim": None, "norm_eps": 1e-6}
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
    pipe = diffusers.ScoreSdeVePipeline(diffusers.UNet2DModel(**settings).eval(), scheduler)
    model = fastdiff.load(pipe)
    assert (model.schedule.t_min, model.schedule.t_max) == (scheduler.config.sigma_min, 50.0)
    with pytest.raises(ValueError, match="scheduler: ScoreSdeVeScheduler is not carried out here"):
        fastdiff.sample(pipe, nfe=3, seeds=[0])
    assert torch.isfinite(fastdiff.sample(pipe, nfe=3, seeds=[0], sampler="heun")).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is not read"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas are not read"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not read"),
    ],
)
def test_schedules_not_read(settings, words, unet):
    with pytest.raises(CheckpointError, match=words):
        fastdiff.load(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**settings)))


def test_options(unet):
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(
        TypeError, match=r"eta: the pipeline's DDPMScheduler has no such option, it has none; name a sampler="
    ):
        fastdiff.sample(pipe, nfe=2, seeds=[0], eta=1.0)
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="eta: 2 is out of range"):
        fastdiff.sample(pipe, nfe=2, seeds=[0], eta=2)
    with pytest.raises(ValueError, match="nfe: DDIMScheduler has 1000 times, not 1001"):
        fastdiff.sample(pipe, nfe=1001, seeds=[0])
    pipe = diffusers.PNDMPipeline(unet, diffusers.PNDMScheduler())
    with pytest.raises(ValueError, match="nfe: 11 is not enough; the fewest that this PNDMScheduler can do is 12"):
        fastdiff.sample(pipe, nfe=11, seeds=[0])


def test_every_scheduler_is_tested():
    named = {f"{kind}Scheduler" for kind, _, _ in [*CASES.values(), *BY_HAND.values()]} | {"CMStochasticIterativeScheduler"}
    assert named == set(SCHEDULERS)


def test_configuration_is_plain(unet):
    """What is kept of the scheduler can be written as JSON."""
    model = fastdiff.load(diffusers.DDPMPipeline(unet, diffusers.UniPCMultistepScheduler()))
    assert json.loads(json.dumps(model.info))["scheduler"]["_class_name"] == "UniPCMultistepScheduler"

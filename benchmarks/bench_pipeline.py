"""fastdiff.sample(pipe, nfe=10) against pipe(num_inference_steps=10): diffusers' own pipeline, its own scheduler.

Both get the pipeline object; fastdiff reads its weights anew in each call, and that time counts.
"""

import pytest
import torch

import fastdiff

# google/ddpm-cifar10-32's network, 35,746,307 parameters
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
NFE = 10


@pytest.mark.parametrize("scheduler", ["DDIM", pytest.param("DPMSolverMultistep", marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.full)])
def test_pipeline(compare, device, batch, scheduler, missing):
    if (why := missing("diffusers")) is not None:
        pytest.skip(why)
    import diffusers

    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**CIFAR10).to(device).eval().requires_grad_(False)
    # Random weights are amplified by 1 / alpha; this schedule's is 1.4, so that pixels stay off the clamp.
    schedule = getattr(diffusers, f"{scheduler}Scheduler")(beta_end=0.002)
    kind = diffusers.DDIMPipeline if scheduler == "DDIM" else diffusers.DDPMPipeline
    pipe = kind(net, schedule)
    pipe.set_progress_bar_config(disable=True)

    def theirs(generator=None):
        return pipe(batch, generator=generator, num_inference_steps=NFE, output_type="np").images

    def check():
        generator = torch.Generator(device)
        expected = torch.from_numpy(theirs(generator.manual_seed(1))).permute(0, 3, 1, 2)
        start = torch.randn(batch, 3, 32, 32, generator=generator.manual_seed(1), device=device)
        got = (fastdiff.sample(pipe, nfe=NFE, seeds=range(batch), noise=[start]) + 1) / 2
        assert float((got - expected).abs().max()) <= 1e-4
        assert float(((expected > 0) & (expected < 1)).float().mean()) > 0.2

    variants = {"fastdiff": lambda: fastdiff.sample(pipe, nfe=NFE, seeds=range(batch)), "diffusers": theirs}
    compare("sample(pipe)", f"DDPM CIFAR-10, {scheduler}, nfe {NFE}, batch {batch}", variants, check, images=batch)

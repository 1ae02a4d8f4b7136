"""fastdiff.sample(pipe, nfe=10) against pipe(num_inference_steps=10): diffusers' own pipeline, its own scheduler.

Both get the pipeline object. fastdiff reads its weights in the first call and lowers the network once that pays: the calls
after that are what is timed.
"""

import sys
from pathlib import Path

import pytest
import torch

import fastdiff

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "checkpoints"))
from full_size import DDPM_CIFAR10

NFE = 10


@pytest.mark.parametrize("scheduler", ["DDIM", pytest.param("DPMSolverMultistep", marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.full)])
def test_pipeline(compare, device, batch, scheduler, missing):
    if (why := missing("diffusers")) is not None:
        pytest.skip(why)
    import diffusers

    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**DDPM_CIFAR10).to(device).eval().requires_grad_(False)
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

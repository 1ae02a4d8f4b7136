"""`fastdiff.accelerate` on diffusers' models with random weights, against the same model channels-last and compiled.

The models: the decoder that ends Stable Diffusion's pipelines, DDPM's CIFAR-10 U-Net, and a conditional U-Net with
transformers (Stable Diffusion's layers at two fifths of its width). x compile is what `accelerate` has to show.
"""

import copy

import pytest
import torch
from harness import with_full

import fastdiff


def decoder(size):
    """49.5 M parameters; images of 8 size pixels a side."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return vae.decoder, lambda n: (torch.randn(n, 4, size, size),)


def unet_2d(size):
    """`ddpm-cifar10-32`: 35.7 M parameters."""
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=size, block_out_channels=(128, 256, 256, 256), layers_per_block=2, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet, lambda n: (torch.randn(n, 3, size, size), torch.full((n,), 500))


def unet_2d_condition(size):
    """Stable Diffusion's layers, 128 to 512 channels wide, three levels."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=(128, 256, 512), layers_per_block=2, cross_attention_dim=768,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return unet, lambda n: (torch.randn(n, 4, size, size), torch.full((n,), 500), torch.randn(n, 77, 768))


CASES = [  # model, size, batch
    (decoder, 16, 1), (decoder, 32, 1), (decoder, 64, 1),
    (unet_2d, 32, 1), (unet_2d, 32, 8), (unet_2d_condition, 32, 1), (unet_2d_condition, 64, 2),
]  # fmt: skip
USUAL = [(decoder, 16, 1), (unet_2d, 32, 1), (unet_2d_condition, 32, 1)]


def name_of(case) -> str:
    model, size, batch = case
    return f"{model.__name__} {size}x{size} batch {batch}"


def channels_last(tensors):
    return tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)


@pytest.mark.parametrize("case", with_full(CASES, USUAL), ids=name_of)
def test_accelerate(compare, device, case, missing):
    if missing("diffusers"):
        pytest.skip(missing("diffusers"))
    model, size, batch = case
    module, inputs = model(size)
    module = module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    inputs = channels_last(t.to(device) for t in inputs(batch))
    fast = copy.deepcopy(module)
    fastdiff.accelerate(fast)
    compiled = torch.compile(module)

    def run(network):
        y = network(*inputs)
        return y if isinstance(y, torch.Tensor) else y.sample

    @torch.inference_mode()
    def check():
        expected = run(module)
        # twice the tolerance of the tests, whose networks are a fifth as deep
        assert float((run(fast) - expected).abs().max()) <= 4e-5 * float(expected.abs().max())

    variants = {"fastdiff": fast, "pytorch": module, "compile": compiled}
    variants = {name: torch.inference_mode()(lambda network=network: run(network)) for name, network in variants.items()}
    compare("accelerate", name_of(case), variants, check, images=batch)

"""Small models of diffusers with the blocks of the large ones, their inputs, and what `accelerate` finds in them."""

import torch

from fastdiff.accelerate.layers import has_packed

TOLERANCE = 2e-5  # of float32 outputs, gradients and parameters after a step, relative to the largest value


def randomised(module):
    """Random weights of a size that keeps signals alive: diffusers starts some layers at zero, which hides errors."""
    with torch.no_grad():
        for p in module.parameters():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return module


def unet_2d(**options):
    """DDPM's U-Net: attention at one resolution, time embedding added."""
    from diffusers import UNet2DModel

    usual = {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DModel(**usual | options), (torch.randn(2, 3, 16, 16), torch.tensor([3, 700]))


def unet_2d_adm():
    """ADM's: scale and shift, resampling inside residual blocks, the network of `cd_imagenet64`."""
    kinds = {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}
    kinds |= {"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "downsample_type": "resnet"}
    return unet_2d(**kinds, upsample_type="resnet", resnet_time_scale_shift="scale_shift")


def unet_2d_condition():
    """Stable Diffusion's: transformers between the residual blocks."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet, (torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 5, 8))


def decoder():
    """The decoder of latent pipelines."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return vae.decoder, (torch.randn(2, 4, 8, 8),)


MODELS = {"unet_2d": unet_2d, "unet_2d_adm": unet_2d_adm, "unet_2d_condition": unet_2d_condition, "decoder": decoder}

# Two norms with SiLU in each residual block and one at the end; every attention block with a norm (the middle one has none
# where scale and shift are embedded); a transformer's norm stands alone.
COUNTS = {
    "unet_2d": {"group_norm_silu": 17, "group_norm_attention": 4},
    "unet_2d_adm": {"group_norm_silu": 21, "group_norm_attention": 3},
    "unet_2d_condition": {"group_norm_silu": 17, "group_norm": 4},
    "decoder": {"group_norm_silu": 13, "group_norm_attention": 1},
}
# Two in each residual block, the last one, those behind upsampling; the first one has too few input channels.
CONVOLUTIONS = {"unet_2d": 18, "unet_2d_adm": 21, "unet_2d_condition": 18, "decoder": 14}


def expected_counts(name):
    return COUNTS[name] | ({"conv3x3": CONVOLUTIONS[name]} if has_packed() else {})


def build(name, seed=0):
    torch.manual_seed(seed)
    module, inputs = MODELS[name]()
    return randomised(module).eval(), inputs


def output(module, inputs):
    y = module(*inputs)
    return y if isinstance(y, torch.Tensor) else y.sample


def far(a, b):
    """Largest difference, relative to the largest value of b."""
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())

"""PyTorch as it is: diffusers' UNet2DModel for DDPM's network, the U-Net without our ops for the others."""

import torch

import fastdiff
from engines.case import TIMES, Case


def diffusers_unet(case: Case):
    """diffusers' own module with the same weights, or None where it has no such network."""
    if not case.net.startswith("ddpm"):
        return None
    from diffusers import UNet2DModel

    folder = case.exported("diffusers")
    if not folder.is_dir():
        fastdiff.to_diffusers(case.model(), folder)
    return UNet2DModel.from_pretrained(folder / "unet").eval().requires_grad_(False)


def forward_of(case: Case, precision: str, wrap=lambda module: module):
    """forward(x, i) of the module, channels-last where bfloat16 gains by it."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    unet = diffusers_unet(case)
    module = (unet or case.plain()).to(dtype)
    module = wrap(module)
    times = [torch.full((case.batch,), t) for t in TIMES]
    embeddings = [e.to(dtype) for e in case.embeddings()]

    @torch.inference_mode()
    def forward(x, i):
        x = x.to(dtype, memory_format=torch.channels_last)
        i %= len(times)
        y = module(x, times[i], return_dict=False)[0] if unet is not None else module(x, embeddings[i])
        return y.float()

    return forward


def prepare(case: Case, precision: str):
    return forward_of(case, precision, lambda module: module.to(memory_format=torch.channels_last))

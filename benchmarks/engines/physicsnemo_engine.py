"""NVIDIA physicsnemo's SongUNet: EDM's network, with its own random weights."""

import torch

from engines import Skipped
from engines.case import TIMES, Case


def prepare(case: Case, precision: str):
    from physicsnemo.models.diffusion import SongUNet

    if case.net != "edm-cifar10":
        raise Skipped("physicsnemo has EDM's network alone")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    c = case.config
    net = SongUNet(c.resolution, c.in_channels, c.out_channels, model_channels=c.channels, channel_mult=list(c.multipliers),
                   num_blocks=c.blocks, attn_resolutions=list(c.attention))  # fmt: skip
    net = net.eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    times = [torch.full((case.batch,), t, dtype=dtype) for t in TIMES]

    @torch.inference_mode()
    def forward(x, i):
        x = x.to(dtype, memory_format=torch.channels_last)
        return net(x, times[i % len(times)], None).float()

    return forward

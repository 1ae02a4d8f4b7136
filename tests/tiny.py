"""A network small enough for tests, with every kind of block."""

import torch

from fastdiff import UNet, UNetConfig


def tiny(**options) -> UNetConfig:
    """8x8 images of one channel, two levels of one block, attention at 4x4; options change any field."""
    usual = {"resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 8, "multipliers": (1, 2)}
    return UNetConfig(**(usual | {"blocks": 1, "attention": (4,), "groups": 4} | options))


def awake(config: UNetConfig, seed: int = 0) -> UNet:
    """A network whose zero-initialised branches are random too, in eval mode."""
    torch.manual_seed(seed)
    net = UNet(config)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()

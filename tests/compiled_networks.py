"""Small networks with every kind of block, for the tests of compiled programs."""

import dataclasses

import torch
from tiny import awake, tiny

from fastdiff import Model, Prediction, UNetConfig, schedules

# 16 channels and groups of 4: what vector code of 16 lanes and its remainders meet.
BASE = tiny(channels=16, dropout=0.3, in_channels=3, out_channels=3)
FILTERED = {"resolution": 8, "channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "groups": 4}
NETWORKS: dict[str, UNetConfig] = {
    "ddpm": BASE,
    "adm": dataclasses.replace(
        BASE, conditioning="scale_shift", resampling="block", head_channels=8, labels=3, frequency_shift=0
    ),
    "ddpmpp": dataclasses.replace(
        BASE, attention_up="last", resampling="block", project_resampled=True, skip_scale=0.5**0.5, group_channels=4
    ),
    "ncsnpp": UNetConfig.ncsnpp(**FILTERED, label_input=True, labels=3, augment=2),
    "ncsnpp-skip": UNetConfig.ncsnpp(**FILTERED, input_pyramid="skip", output_pyramid="skip"),
    "bare-end": dataclasses.replace(BASE, attention_middle="bare", resampling="conv_end", channels=24, groups=8),
}


def model_of(name: str) -> Model:
    """A consistency model of the network."""
    config = NETWORKS[name]
    shape = (config.in_channels, config.resolution, config.resolution)
    net = awake(config)
    return Model(net, schedules.EDM(), Prediction("edm"), "consistency", shape, config.labels, {2: [80.0, 0.8]})


def inputs(config: UNetConfig, n: int = 3, size: tuple[int, int] | None = None):
    """x, c_noise, labels."""
    torch.manual_seed(1)
    size = size or (config.resolution, config.resolution)
    labels = torch.arange(n) % config.labels if config.labels else None
    return torch.randn(n, config.in_channels, *size), torch.linspace(-1, 1, n), labels

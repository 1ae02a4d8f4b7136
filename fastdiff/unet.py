"""The one U-Net: DDPM, Improved DDPM / ADM and DDPM++ / NCSN++ / EDM are settings of one dataclass."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.nn import Conv2d, Downsample, FourierEmbedding, GroupNormSiLU, Linear, PositionalEmbedding, ResBlock, Upsample


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet`; every field is written into checkpoints.

    The defaults are DDPM's CIFAR-10 network (35,746,307 parameters). `UNetConfig.ddpmpp()` is score SDE's and EDM's
    DDPM++ (55.73 M).
    """

    resolution: int = 32  # height and width it was made for; attention is placed by it
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128  # of the first level
    multipliers: tuple[int, ...] = (1, 2, 2, 2)  # channels of each level, in units of `channels`
    blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    attention: tuple[int, ...] = (16,)  # resolutions with attention; the middle always has it
    attention_up: str = "all"  # on the way up: after "all" blocks of such a level or the "last"
    head_channels: int = 0  # channels of an attention head; 0: a single head
    dropout: float = 0.1
    groups: int = 32  # of every GroupNorm, at most channels / group_channels
    group_channels: int = 1
    eps: float = 1e-6
    conditioning: str = "add"  # how the embedding enters a block: "add" or "scale_shift"
    resampling: str = "conv"  # "conv": a convolution; "block": inside a residual block
    project_resampled: bool = False  # a 1x1 convolution on the skip path of resampling blocks even at equal channels
    skip_scale: float = 1.0  # factor on every residual sum; sqrt(1/2) keeps the variance
    embedding: str = "positional"  # of the time: "positional" or "fourier"
    embedding_multiplier: int = 4  # width of the embedding, in units of `channels`
    labels: int = 0  # number of classes; 0: unconditional

    @classmethod
    def ddpmpp(cls, **changes) -> "UNetConfig":
        """DDPM++ as in EDM's CIFAR-10 configuration, without augmentation input."""
        base: dict[str, Any] = {
            "multipliers": (2, 2, 2),
            "blocks": 4,
            "attention_up": "last",
            "dropout": 0.13,
            "group_channels": 4,
            "resampling": "block",
            "project_resampled": True,
            "skip_scale": math.sqrt(0.5),
        }
        return cls(**(base | changes))

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention", tuple(self.attention))
        choices = {
            "conditioning": ("add", "scale_shift"),
            "resampling": ("conv", "block"),
            "embedding": ("positional", "fourier"),
            "attention_up": ("all", "last"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"UNetConfig.{name}: {value!r} is not known; use one of {', '.join(allowed)}")
        factor = 2 ** (len(self.multipliers) - 1)
        if self.resolution % factor:
            raise ValueError(
                f"UNetConfig.resolution: {self.resolution} cannot be halved {len(self.multipliers) - 1} times; "
                f"use a multiple of {factor} or fewer multipliers"
            )

    @property
    def embedding_width(self) -> int:
        return self.embedding_multiplier * self.channels

    def groups_of(self, channels: int) -> int:
        return min(self.groups, max(channels // self.group_channels, 1))

    def heads_of(self, channels: int) -> int:
        return channels // self.head_channels if self.head_channels else 1


class UNet(nn.Module):
    """F(x, c_noise, labels): [B, in_channels, H, W], [B], int64 [B] or None -> [B, out_channels, H, W].

    Residual blocks go down and up through the levels; the output of every step down is concatenated to the input of a
    block on the way up. References: Ho 2020; Nichol and Dhariwal 2021; Song 2021; Karras 2022.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        embedding = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}[config.embedding]
        self.time = embedding(config.channels)
        self.time0 = Linear(config.channels, config.embedding_width)
        self.time1 = Linear(config.embedding_width, config.embedding_width)
        self.label = nn.Embedding(config.labels, config.embedding_width) if config.labels else None

        channels = [config.channels * m for m in config.multipliers]
        self.conv_in = Conv2d(config.in_channels, config.channels)
        self.down = nn.ModuleList()
        skips = self._build_down(channels)
        self.middle = nn.ModuleList(
            [ResBlock(channels[-1], channels[-1], config, attention=True), ResBlock(channels[-1], channels[-1], config)]
        )
        self.up = nn.ModuleList()
        self._build_up(channels, skips)
        self.norm_out = GroupNormSiLU(channels[0], config.groups_of(channels[0]), config.eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, gain=0)

    def _build_down(self, channels: list[int]) -> list[int]:
        config, width, skips = self.config, self.config.channels, [self.config.channels]
        for level, c in enumerate(channels):
            resolution = config.resolution >> level
            for _ in range(config.blocks):
                self.down.append(ResBlock(width, c, config, attention=resolution in config.attention))
                width = c
                skips.append(width)
            if level < len(channels) - 1:
                block = config.resampling == "block"
                self.down.append(ResBlock(c, c, config, change="down") if block else Downsample(c))
                skips.append(width)
        return skips

    def _build_up(self, channels: list[int], skips: list[int]) -> None:
        config, width = self.config, channels[-1]
        for level, c in reversed(list(enumerate(channels))):
            if level < len(channels) - 1:
                block = config.resampling == "block"
                self.up.append(ResBlock(width, width, config, change="up") if block else Upsample(width))
            for i in range(config.blocks + 1):
                here = (config.resolution >> level) in config.attention
                attention = here and (config.attention_up == "all" or i == config.blocks)
                self.up.append(ResBlock(width + skips.pop(), c, config, attention=attention))
                width = c

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """[B] times and [B] labels -> the embedding [B, embedding_width] that every block reads."""
        e = self.time1(nn.functional.silu(self.time0(self.time(c_noise))))
        if self.label is not None:
            if labels is None:
                raise ValueError("labels: this network is class-conditional; pass int64 [B] labels")
            e = e + self.label(labels)
        elif labels is not None:
            raise ValueError("labels: this network is unconditional; leave labels out")
        return nn.functional.silu(e)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        factor = 2 ** (len(self.config.multipliers) - 1)
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(
                f"x: {x.shape[-2]} x {x.shape[-1]} cannot be halved to the last level; use multiples of {factor}"
            )
        embedding = self.embed(c_noise, labels)
        x = self.conv_in(x)
        skips = [x]
        for module in self.down:
            x = module(x, embedding)
            skips.append(x)
        for module in self.middle:
            x = module(x, embedding)
        for module in self.up:
            if isinstance(module, ResBlock) and not module.change:
                x = torch.cat((x, skips.pop()), dim=1)
            x = module(x, embedding)
        return self.conv_out(self.norm_out(x))

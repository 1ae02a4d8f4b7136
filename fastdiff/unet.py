"""The one U-Net: DDPM, Improved DDPM / ADM and DDPM++ / NCSN++ / EDM are settings of one dataclass."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.nn import (
    Conv2d,
    Downsample,
    FourierEmbedding,
    GroupNormSiLU,
    ImageHead,
    Linear,
    PositionalEmbedding,
    ResBlock,
    ResidualPyramid,
    SkipPyramid,
    Upsample,
)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet`; every field is written into checkpoints.

    The defaults are DDPM's CIFAR-10 network (35,746,307 parameters). `UNetConfig.ddpmpp()` is score SDE's and EDM's
    DDPM++ (55.73 M), `UNetConfig.ncsnpp()` their NCSN++, `UNetConfig.adm()` ADM's ImageNet-64 network (295.9 M).
    """

    resolution: int = 32  # height and width it was made for; attention is placed by it
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128  # of the first convolution
    multipliers: tuple[float, ...] = (1, 2, 2, 2)  # channels of each level, in units of `channels`
    blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    attention: tuple[int, ...] = (16,)  # resolutions with attention
    attention_up: str = "all"  # on the way up: after "all" blocks of such a level or the "last"
    head_channels: int = 0  # channels of an attention head, narrower blocks have no attention; 0: `heads` heads
    dropout: float = 0.1
    groups: int = 32  # of every GroupNorm, at most channels / group_channels
    group_channels: int = 1
    eps: float = 1e-6
    conditioning: str = "add"  # how the embedding enters a block: "add" or "scale_shift"
    resampling: str = "conv"  # a convolution ("conv"; "conv_end": zeros at right and bottom only) or a residual "block"
    project_resampled: bool = False  # a 1x1 convolution on the skip path of resampling blocks even at equal channels
    skip_scale: float = 1.0  # factor on every residual sum; sqrt(1/2) keeps the variance
    embedding: str = "positional"  # of the time: "positional" or "fourier"
    embedding_multiplier: int = 4  # width of the embedding, in units of `channels`
    labels: int = 0  # number of classes; 0: unconditional
    heads: int = 1  # attention heads where head_channels is 0
    attention_middle: str = "norm"  # "bare": it sees its input as it is (diffusers with scale_shift); "none"
    filter: tuple[float, ...] = (1, 1)  # of resampling blocks and pyramids
    input_pyramid: str = "none"  # the image enters each level: "skip", "residual"
    output_pyramid: str = "none"  # "skip": each level adds to the output
    time_multiplier: int = 1  # sines and cosines of the time, in units of `channels`
    frequency_shift: float = 1  # of the positional embedding: 1 DDPM, 0 ADM
    label_input: bool = False  # classes join the time before its layers, not after
    label_optional: bool = False  # without labels: no class, instead of an error
    augment: int = 0  # numbers that describe an image's augmentation (EDM)

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

    @classmethod
    def ncsnpp(cls, **changes) -> "UNetConfig":
        """NCSN++ as in EDM's CIFAR-10 configuration: DDPM++ with filters, Fourier features and an input pyramid."""
        base = {"filter": (1, 3, 3, 1), "embedding": "fourier", "time_multiplier": 2, "input_pyramid": "residual"}
        return cls.ddpmpp(**(base | changes))

    @classmethod
    def adm(cls, **changes) -> "UNetConfig":
        """ADM as in Dhariwal and Nichol's class-conditional ImageNet-64 model."""
        base: dict[str, Any] = {
            "resolution": 64,
            "channels": 192,
            "multipliers": (1, 2, 3, 4),
            "blocks": 3,
            "attention": (32, 16, 8),
            "head_channels": 64,
            "eps": 1e-5,
            "conditioning": "scale_shift",
            "resampling": "block",
            "frequency_shift": 0,
            "labels": 1000,
        }
        return cls(**(base | changes))

    def __post_init__(self):
        for name in ("multipliers", "attention", "filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        choices = {
            "conditioning": ("add", "scale_shift"),
            "resampling": ("conv", "conv_end", "block"),
            "embedding": ("positional", "fourier"),
            "attention_up": ("all", "last"),
            "attention_middle": ("norm", "bare", "none"),
            "input_pyramid": ("none", "skip", "residual"),
            "output_pyramid": ("none", "skip"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"UNetConfig.{name}: {value!r} is not known; use one of {', '.join(allowed)}")
        self._check_numbers()

    def _check_numbers(self) -> None:
        # The upper bounds keep a damaged description from asking for endless networks.
        bounds = {
            "resolution": 2**16,
            "in_channels": 2**12,
            "out_channels": 2**12,
            "channels": 2**14,
            "blocks": 64,
            "heads": 2**10,
            "groups": 2**12,
            "group_channels": 2**12,
            "embedding_multiplier": 2**8,
            "time_multiplier": 2**8,
        }
        for name, most in bounds.items():
            if not 1 <= getattr(self, name) <= most or int(getattr(self, name)) != getattr(self, name):
                raise ValueError(f"UNetConfig.{name}: {getattr(self, name)} is no integer in 1 ... {most}")
        if not 1 <= len(self.multipliers) <= 12:
            raise ValueError(f"UNetConfig.multipliers: {len(self.multipliers)} levels; use 1 ... 12")
        for m in self.multipliers:
            if not 0 < m <= 256 or m * self.channels != int(m * self.channels):
                raise ValueError(f"UNetConfig.multipliers: {m} times {self.channels} is no number of channels")
        if (
            not 2 <= len(self.filter) <= 64
            or len(self.filter) % 2
            or self.filter != self.filter[::-1]
            or not sum(self.filter)
        ):
            raise ValueError(f"UNetConfig.filter: {self.filter} is not even in length and symmetric, such as (1, 3, 3, 1)")
        if self.time_multiplier * self.channels % 2:
            raise ValueError(f"UNetConfig.channels: {self.channels} is odd; sines and cosines need an even one")
        factor = 2 ** (len(self.multipliers) - 1)
        if self.resolution % factor:
            raise ValueError(
                f"UNetConfig.resolution: {self.resolution} cannot be halved {len(self.multipliers) - 1} times; "
                f"use a multiple of {factor} or fewer multipliers"
            )

    def describe(self) -> dict[str, Any]:
        """The fields as plain values; those from `heads` on are younger and left out at their defaults.

        So older descriptions, and the hashes of their models, stay what they were.
        """
        fields = dataclasses.fields(self)
        old = [f.name for f in fields].index("heads")
        values = {f.name: getattr(self, f.name) for f in fields}
        return {f.name: values[f.name] for i, f in enumerate(fields) if i < old or values[f.name] != f.default}

    @property
    def levels(self) -> list[int]:
        """Channels of each level."""
        return [int(self.channels * m) for m in self.multipliers]

    @property
    def time_width(self) -> int:
        return self.time_multiplier * self.channels

    @property
    def embedding_width(self) -> int:
        return self.embedding_multiplier * self.channels

    def groups_of(self, channels: int) -> int:
        return min(self.groups, max(channels // self.group_channels, 1))

    def heads_of(self, channels: int) -> int:
        return channels // self.head_channels if self.head_channels else self.heads


class UNet(nn.Module):
    """F(x, c_noise, labels, augment_labels): [B, in_channels, H, W], [B], ... -> [B, out_channels, H, W].

    Labels are int64 [B] or one-hot [B, labels]; augment_labels are [B, augment] or None. Residual blocks go down and up
    through the levels; the output of every step down is concatenated to the input of a block on the way up.
    References: Ho 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021; Song 2021; Karras 2022.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.time_width
        self.time: PositionalEmbedding | FourierEmbedding
        if config.embedding == "positional":
            self.time = PositionalEmbedding(width, config.frequency_shift)
        else:
            self.time = FourierEmbedding(width)
        self.time0 = Linear(width, config.embedding_width)
        self.time1 = Linear(config.embedding_width, config.embedding_width)
        joins = width if config.label_input else config.embedding_width
        self.label = nn.Embedding(config.labels, joins) if config.labels else None
        self.augment = Linear(config.augment, width, bias=False) if config.augment else None

        channels = config.levels
        self.conv_in = Conv2d(config.in_channels, config.channels)
        self.down = nn.ModuleList()
        self.pyramid = nn.ModuleList()
        skips = self._build_down(channels)
        self.middle = nn.ModuleList(
            [
                ResBlock(
                    channels[-1],
                    channels[-1],
                    config,
                    attention=config.attention_middle != "none",
                    normed=config.attention_middle == "norm",
                ),
                ResBlock(channels[-1], channels[-1], config),
            ]
        )
        self.up = nn.ModuleList()
        self.images = nn.ModuleList()
        self._build_up(channels, skips)
        self.norm_out = GroupNormSiLU(channels[0], config.groups_of(channels[0]), config.eps)
        self.conv_out = Conv2d(channels[0], config.out_channels, gain=0)

    def _build_down(self, channels: list[int]) -> list[int]:
        config, width, image, skips = self.config, self.config.channels, self.config.in_channels, [self.config.channels]
        for level, c in enumerate(channels):
            resolution = config.resolution >> level
            for _ in range(config.blocks):
                self.down.append(ResBlock(width, c, config, attention=resolution in config.attention))
                width = c
                skips.append(width)
            if level < len(channels) - 1:
                if config.resampling == "block":
                    self.down.append(ResBlock(c, c, config, change="down"))
                else:
                    self.down.append(Downsample(c, end=config.resampling == "conv_end"))
                if config.input_pyramid != "none":
                    join = {"skip": SkipPyramid, "residual": ResidualPyramid}[config.input_pyramid]
                    self.pyramid.append(join(image, c, config))
                    image = c if config.input_pyramid == "residual" else image
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
            if level and config.output_pyramid == "skip":
                self.images.append(ImageHead(c, config.out_channels, config))

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """[B] times, labels and augment labels -> the embedding [B, embedding_width] that every block reads."""
        e = self.time(c_noise)
        label = self._label(labels)
        if label is not None and self.config.label_input:
            e = e + label
        if augment_labels is not None:
            if self.augment is None:
                raise ValueError("augment_labels: this network was not trained with augmentation; leave them out")
            e = e + self.augment(augment_labels)
        e = self.time1(nn.functional.silu(self.time0(e)))
        if label is not None and not self.config.label_input:
            e = e + label
        return nn.functional.silu(e)

    def _label(self, labels: Tensor | None) -> Tensor | None:
        if self.label is None:
            if labels is not None:
                raise ValueError("labels: this network is unconditional; leave labels out")
            return None
        if labels is None:
            if not self.config.label_optional:
                raise ValueError("labels: this network is class-conditional; pass int64 [B] labels")
            return None
        return self.label(labels) if labels.dim() == 1 else labels.to(self.label.weight.dtype) @ self.label.weight

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        factor = 2 ** (len(self.config.multipliers) - 1)
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(
                f"x: {x.shape[-2]} x {x.shape[-1]} cannot be halved to the last level; use multiples of {factor}"
            )
        embedding = self.embed(c_noise, labels, augment_labels)
        pyramid, images = iter(self.pyramid), iter(self.images)
        image, x = x, self.conv_in(x)
        skips = [x]
        for module in self.down:
            x = module(x, embedding)
            if module.change and len(self.pyramid):
                image, x = next(pyramid)(image, x)
            skips.append(x)
        for module in self.middle:
            x = module(x, embedding)
        output = None
        for module in self.up:
            if not module.change:
                x = torch.cat((x, skips.pop()), dim=1)
            elif len(self.images):
                output = next(images)(x, output)
            x = module(x, embedding)
        y = self.conv_out(self.norm_out(x))
        return y if output is None else y + output

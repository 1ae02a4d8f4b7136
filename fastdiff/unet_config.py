"""What a `UNet` looks like: one dataclass, and the published networks as settings of it."""

import dataclasses
import math
from typing import Any


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

"""The one U-Net: DDPM, Improved DDPM / ADM and DDPM++ / NCSN++ / EDM are settings of one dataclass."""

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
from fastdiff.unet_config import UNetConfig

__all__ = ["UNet", "UNetConfig"]


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

"""The modules a diffusion U-Net is built from, thin over `fastdiff.ops`."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import ops
from fastdiff.layers import Conv2d, Dropout, Linear


class GroupNormSiLU(nn.Module):
    """GroupNorm, optional per-sample shift, scale and SiLU in one pass: see `fastdiff.ops.group_norm_silu`."""

    def __init__(self, channels: int, groups: int, eps: float, silu: bool = True):
        super().__init__()
        if channels % groups:
            raise ValueError(f"groups: {groups} groups do not divide {channels} channels; change UNetConfig.groups")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.eps, self.silu = groups, eps, silu

    def forward(
        self, x: Tensor, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, add, scale, shift, silu=self.silu)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, groups={self.groups}, eps={self.eps}, silu={self.silu}"


class Attention(nn.Module):
    """Self-attention over the pixels: (x + proj(softmax(q k^T / sqrt(d)) v)) skip_scale, q, k, v from GroupNorm(x).

    normed=False: from x itself.
    """

    def __init__(self, channels: int, heads: int, groups: int, eps: float, skip_scale: float, normed: bool = True):
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: {heads} heads do not divide {channels} channels; change UNetConfig.heads")
        self.norm = GroupNormSiLU(channels, groups, eps, silu=False) if normed else nn.Identity()
        self.qkv = Conv2d(channels, 3 * channels, kernel=1)
        self.proj = Conv2d(channels, channels, kernel=1, gain=0)
        self.heads, self.skip_scale = heads, skip_scale

    def forward(self, x: Tensor) -> Tensor:
        if (
            isinstance(self.norm, GroupNormSiLU)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
        ):
            norm, qkv, proj = self.norm, self.qkv.weight.flatten(1), self.proj.weight.flatten(1)
            given = (x, norm.weight, norm.bias, norm.groups, qkv, self.qkv.bias, proj, self.proj.bias)
            return ops.group_norm_attention(*given, self.heads, norm.eps, out_scale=self.skip_scale)
        # Training keeps the library's attention, whose backward need not compute q, k and v again.
        b, c, h, w = x.shape
        # [B, 3, heads, C/heads, HW] -> q, k, v [B, heads, HW, C/heads]
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        y = functional.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(-1, -2).reshape(b, c, h, w))
        return (x + y) * self.skip_scale


class Resample(nn.Module):
    """Halve ("down") or double ("up") an image with a filter; "" leaves it as it is.

    The filter (1, 1) is a mean of 2x2 pixels down and nearest neighbour up; (1, 3, 3, 1) is NCSN++'s. Zeros lie outside.
    """

    taps: Tensor

    def __init__(self, change: str, filter: tuple[float, ...] = (1, 1)):
        super().__init__()
        self.change, self.filter, self.box = change, tuple(filter), tuple(filter) == (1, 1)
        self.reset()

    def reset(self) -> None:
        """Compute the filter, which no checkpoint holds: its sum is 1 down and 2 up, where every other pixel is 0."""
        taps = np.array(self.filter) / sum(self.filter) * (2 if self.change == "up" else 1)
        self.register_buffer("taps", torch.tensor(taps, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.change:
            return x
        if self.box:
            halve = self.change == "down"
            return functional.avg_pool2d(x, 2) if halve else functional.interpolate(x, scale_factor=2, mode="nearest")
        up, down = (1, 2) if self.change == "down" else (2, 1)
        return ops.resample(x, self.taps, up, down, ops.resample_pads(len(self.filter), up, down))

    def extra_repr(self) -> str:
        return f"{self.change or 'nothing'}, filter={self.filter}"


class ResBlock(nn.Module):
    """norm-SiLU-(resample)-conv, conditioned norm-SiLU-dropout-conv, plus a skip path; attention where asked.

    The embedding enters the second norm as a shift of its input ("add", DDPM) or of its output with a scale
    ("scale_shift", Improved DDPM and ADM).
    """

    def __init__(self, inputs: int, outputs: int, config, attention: bool = False, change: str = "", normed: bool = True):
        super().__init__()
        eps, groups = config.eps, config.groups_of
        self.change, self.conditioning, self.skip_scale = change, config.conditioning, config.skip_scale
        self.resample = Resample(change, config.filter)
        self.norm0 = GroupNormSiLU(inputs, groups(inputs), eps)
        self.conv0 = Conv2d(inputs, outputs)
        self.condition = Linear(config.embedding_width, outputs * (2 if self.conditioning == "scale_shift" else 1))
        self.norm1 = GroupNormSiLU(outputs, groups(outputs), eps)
        self.dropout = Dropout(config.dropout)
        self.conv1 = Conv2d(outputs, outputs, gain=0)
        project = inputs != outputs or (change and config.project_resampled)
        self.skip = Conv2d(inputs, outputs, kernel=1) if project else None
        heads = config.heads_of(outputs)
        attention = attention and heads > 0
        kind = (outputs, heads, groups(outputs), eps, self.skip_scale, normed)
        self.attention = Attention(*kind) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(self.resample(self.norm0(x)))
        condition = self.condition(embedding)
        if self.conditioning == "scale_shift":
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift)
        else:
            h = self.norm1(h, add=condition)
        h = self.conv1(self.dropout(h))
        x = self.resample(x)
        x = (x if self.skip is None else self.skip(x)) + h
        if self.skip_scale != 1:
            x = x * self.skip_scale
        return x if self.attention is None else self.attention(x)


class Downsample(nn.Module):
    """Halving by a 3x3 convolution of stride 2, with zeros all around or, as in DDPM, at the right and bottom only."""

    change = "down"

    def __init__(self, channels: int, end: bool = False):
        super().__init__()
        self.conv = Conv2d(channels, channels, stride=2, padding=0 if end else 1)
        self.end = end

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)) if self.end else x)


class Upsample(nn.Module):
    """Doubling by nearest neighbour and a 3x3 convolution (DDPM)."""

    change = "up"

    def __init__(self, channels: int):
        super().__init__()
        self.resample = Resample("up")
        self.conv = Conv2d(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(self.resample(x))


class SkipPyramid(nn.Module):
    """NCSN++ "input skip": a halved copy of the image enters every level through a 1x1 convolution."""

    def __init__(self, image: int, channels: int, config):
        super().__init__()
        self.resample = Resample("down", config.filter)
        self.conv = Conv2d(image, channels, kernel=1)

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        image = self.resample(image)
        return image, x + self.conv(image)


class ResidualPyramid(nn.Module):
    """NCSN++ "input residual": the image, halved by filter and convolution, is added at every level."""

    def __init__(self, image: int, channels: int, config):
        super().__init__()
        self.resample = Resample("down", config.filter)
        self.conv = Conv2d(image, channels, stride=2, padding=0)
        self.skip_scale = config.skip_scale

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # Filter and convolution see zeros around the image only once: they are one convolution, of stride 2.
        pad = ops.resample_pads(len(self.resample.filter), down=2, kernel=3)
        image = self.conv(ops.resample(image, self.resample.taps, pad=pad))
        x = (x + image) * self.skip_scale
        return x, x


class ImageHead(nn.Module):
    """NCSN++ "output skip": conv(norm(x)), added to the doubled image of the level below."""

    def __init__(self, channels: int, image: int, config):
        super().__init__()
        self.norm = GroupNormSiLU(channels, config.groups_of(channels), config.eps)
        self.conv = Conv2d(channels, image, gain=0)
        self.resample = Resample("up", config.filter)

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        y = self.conv(self.norm(x))
        return self.resample(y if image is None else y + image)


class PositionalEmbedding(nn.Module):
    """[B] -> [B, channels]: sines and cosines of c_noise times `ops.frequencies` (Vaswani 2017, DDPM).

    DDPM, score SDE, DDPM++: freq_shift 1, sines first. ADM: freq_shift 0, cosines first. diffusers: freq_shift, and
    sin_first = not flip_sin_to_cos.
    """

    frequencies: Tensor

    def __init__(self, channels: int, freq_shift: float = 1.0, sin_first: bool = True):
        super().__init__()
        self.count, self.freq_shift, self.sin_first = channels // 2, freq_shift, sin_first
        self.reset()

    def reset(self) -> None:
        """Compute the frequencies, which no checkpoint holds."""
        self.register_buffer("frequencies", ops.frequencies(self.count, freq_shift=self.freq_shift), persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        return ops.embedding(c_noise, self.frequencies, self.sin_first)


class FourierEmbedding(nn.Module):
    """[B] -> [B, channels]: sines, then cosines, of 2 pi c_noise times fixed random frequencies (score SDE, NCSN++)."""

    frequencies: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("frequencies", nn.init.normal_(torch.empty(channels // 2), std=scale))

    def forward(self, c_noise: Tensor) -> Tensor:
        # Angles rounded to float32 as in training: they reach 1000 radians, and exact ones move NCSN++'s output by 1e-5.
        angle = torch.outer(c_noise, 2 * math.pi * self.frequencies.to(c_noise.dtype))
        return torch.cat((angle.sin(), angle.cos()), dim=1)

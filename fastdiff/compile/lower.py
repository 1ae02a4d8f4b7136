"""Lowering: a `UNet` becomes a flat list of steps, its residual blocks and attention spelled out and fused where ops can.

What is folded: the additive embedding into the first convolution's bias, for every sample; the skip scale, the residual
sum and the next norm's statistics into the convolution in front of them; norm and SiLU into the convolution behind them;
nearest-neighbour doubling below the norm, whose statistics it does not change.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.compile.product import convolution
from fastdiff.compile.steps import (
    Apply,
    Attention,
    Conv3x3,
    Halve,
    Join,
    Normalise,
    NormWeights,
    Project,
    Step,
    double,
    halve,
    scaled_sum,
)
from fastdiff.nn import Attention as AttentionModule
from fastdiff.nn import Downsample, GroupNormSiLU, ResBlock, Upsample
from fastdiff.unet import UNet


@dataclasses.dataclass
class Value:
    """An image of the program: its number, its channels and size, and the step whose statistics are also its own."""

    number: int
    channels: int
    size: tuple[int, int]
    made_by: Conv3x3 | None = None


class Lowering:
    """The steps of one network; `values` counts what they write. Weights are the network's own where dtype allows."""

    def __init__(self, network: UNet, dtype: torch.dtype, size: tuple[int, int]):
        self.network, self.dtype, self.config = network, dtype, network.config
        self.steps: list[Step] = []
        self.sizes: dict[str, tuple[int, int]] = {}  # of each Conv3x3 and Attention step's image
        self.conditions: list[tuple[nn.Linear, Tensor | None]] = []  # linear layers, and the bias that joins each
        self.operations = 0  # multiplications and additions per image in convolutions and projections
        self.values = 1
        self.largest = 0  # numbers of an image in the largest value
        self.input = Value(0, self.config.in_channels, size)
        self.output = self._network()

    def _new(self, channels: int, size: tuple[int, int]) -> Value:
        self.values += 1
        self.largest = max(self.largest, channels * size[0] * size[1])
        return Value(self.values - 1, channels, size)

    def _emit(self, make: Callable[[int], Step], channels: int, size: tuple[int, int]) -> Value:
        """Append make(number of the value that it writes)."""
        value = self._new(channels, size)
        step = make(value.number)
        self.steps.append(step)
        value.made_by = step if isinstance(step, Conv3x3) else None
        return value

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def _norm(self, module: GroupNormSiLU, x: Value, scale_shift: int | None = None) -> NormWeights:
        """The norm of x, with the statistics that the step before took, if it can."""
        norm = NormWeights(
            module.weight.detach(), module.bias.detach(), module.groups, module.eps, module.silu, None, scale_shift
        )
        step = x.made_by
        if step is not None and (step.stats is None or step.stats_groups == module.groups):
            if step.stats is None:
                step.stats, step.stats_groups = self._new(0, (0, 0)).number, module.groups
            norm.stats = step.stats
        return norm

    def _convolve(self, name: str, module: nn.Conv2d, x: Value, norm: NormWeights | None = None, **settings) -> Value:
        weight, bias = module.weight.detach(), _bias(module)
        self.sizes[name] = x.size
        self.operations += 18 * module.in_channels * module.out_channels * x.size[0] * x.size[1]
        make = lambda out: Conv3x3(out, name, x.number, weight, bias, norm, **settings)  # noqa: E731
        return self._emit(make, module.out_channels, x.size)

    def _project(self, module: nn.Conv2d, x: Value) -> Value:
        self.operations += 2 * module.weight.numel() * x.size[0] * x.size[1]
        project = convolution(self._cast(module.weight), _bias(module), x.size, 1, 0)
        return self._emit(lambda out: Project(out, x.number, project), module.out_channels, x.size)

    def _apply(self, call: Callable[..., Tensor], channels: int, size: tuple[int, int], *given: Value | None) -> Value:
        numbers = tuple(None if value is None else value.number for value in given)
        return self._emit(lambda out: Apply(out, call, numbers), channels, size)

    def _resample(self, module: nn.Module, x: Value) -> Value:
        """module.resample on x."""
        change, box = module.resample.change, module.resample.box  # type: ignore[union-attr]
        h, w = x.size
        size = (h // 2, w // 2) if change == "down" else (2 * h, 2 * w)
        call = (halve if change == "down" else double) if box else module.resample
        y = self._apply(call, x.channels, size, x)  # type: ignore[arg-type]
        if change == "up" and box:
            y.made_by = x.made_by  # every pixel four times: the same statistics
        return y

    def _block(self, name: str, block: ResBlock, x: Value) -> Value:
        condition = len(self.conditions)
        additive = block.conditioning == "add"
        self.conditions.append((block.condition, _bias(block.conv0) if additive else None))
        skip, normed, project = x, x, block.skip
        if block.change == "up" and block.resample.box:
            normed = self._resample(block, x)
            norm0 = self._norm(block.norm0, normed)
            # a projection of doubled pixels is the doubled projection, of a quarter as many
            skip = normed if project is None else self._resample(block, self._project(project, x))
            project = None
        elif block.change:
            given = self._norm(block.norm0, x)
            normed = self._emit(lambda out: Normalise(out, x.number, given), x.channels, x.size)
            normed, skip, norm0 = self._resample(block, normed), self._resample(block, x), None
        else:
            norm0 = self._norm(block.norm0, x)
        h = self._convolve(f"{name}.conv0", block.conv0, normed, norm0, add=condition if additive else None)
        if project is not None:
            skip = self._project(project, skip)
        norm1 = self._norm(block.norm1, h, None if additive else condition)
        settings = {"residual": skip.number, "out_scale": float(block.skip_scale)}
        y = self._convolve(f"{name}.conv1", block.conv1, h, norm1, **settings)
        return y if block.attention is None else self._attention(f"{name}.attention", block.attention, y)

    def _attention(self, name: str, module: AttentionModule, x: Value) -> Value:
        if not isinstance(module.norm, GroupNormSiLU):
            return self._apply(module, x.channels, x.size, x)
        norm, cast = self._norm(module.norm, x), self._cast
        packed = [(cast(m.weight).flatten(1), cast(m.bias)) for m in (module.qkv, module.proj)]  # type: ignore[arg-type]
        self.sizes[name] = x.size
        self.operations += 8 * x.channels**2 * x.size[0] * x.size[1] + 4 * x.channels * (x.size[0] * x.size[1]) ** 2
        settings: tuple[Any, ...] = (norm, *packed, module.heads, module.skip_scale)
        return self._emit(lambda out: Attention(out, name, x.number, *settings), x.channels, x.size)

    def _module(self, name: str, module: nn.Module, x: Value) -> Value:
        if isinstance(module, ResBlock):
            return self._block(name, module, x)
        if isinstance(module, Upsample):
            return self._convolve(f"{name}.conv", module.conv, self._resample(module, x))
        assert isinstance(module, Downsample)
        conv, (h, w) = module.conv, x.size
        self.operations += 18 * x.channels**2 * (h // 2) * (w // 2)
        halve = convolution(self._cast(conv.weight), _bias(conv), (h, w), 2, 0 if module.end else 1)
        return self._emit(lambda out: Halve(out, x.number, halve, module.end), x.channels, (h // 2, w // 2))

    def _network(self) -> Value:
        net, pyramid, images = self.network, iter(self.network.pyramid), iter(self.network.images)
        image, x = self.input, self._convolve("conv_in", net.conv_in, self.input)
        skips = [x]
        for i, module in enumerate(net.down):
            x = self._module(f"down.{i}", module, x)
            if module.change and len(net.pyramid):
                image, x = self._pyramid(next(pyramid), image, x)
            skips.append(x)
        for i, module in enumerate(net.middle):
            x = self._module(f"middle.{i}", module, x)
        output: Value | None = None
        for i, module in enumerate(net.up):
            if not module.change:
                skip, here = skips.pop(), x
                join = functools.partial(Join, parts=(here.number, skip.number))
                x = self._emit(join, here.channels + skip.channels, here.size)
            elif len(net.images):
                output = self._apply(next(images), self.config.out_channels, _doubled(x.size), x, output)
            x = self._module(f"up.{i}", module, x)
        y = self._convolve("conv_out", net.conv_out, x, self._norm(net.norm_out, x))
        return y if output is None else self._apply(scaled_sum(1.0), y.channels, y.size, y, output)

    def _pyramid(self, module: nn.Module, image: Value, x: Value) -> tuple[Value, Value]:
        """The halved image, and x with it; both are one value in residual pyramids."""
        joined = self._apply(lambda i, x: module(i.float(), x.float())[1].to(x.dtype), x.channels, x.size, image, x)
        if self.config.input_pyramid == "residual":
            return joined, joined
        return self._apply(module.resample, image.channels, x.size, image), joined  # type: ignore[arg-type]


def _bias(module: nn.Conv2d) -> Tensor:
    assert module.bias is not None
    return module.bias.detach()


def _doubled(size: tuple[int, int]) -> tuple[int, int]:
    return 2 * size[0], 2 * size[1]

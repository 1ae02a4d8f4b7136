"""The steps of a program: each reads values by their number, computes, and writes one value and perhaps its statistics.

Values are images [N, C, H, W], channels-last; statistics are [N, groups, 2] float32 as `ops.group_norm_silu` takes them.
A condition is what the embedding gives one block: [N, width] float32.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import ops
from fastdiff.compile.attend import FUSED, LibraryAttention
from fastdiff.compile.library import LibraryConvolution

Values = list[Tensor | None]
Conditions = Sequence[Tensor]

# Below the wrappers, whose checks of what lowering made would take as long as a small layer.
CONV3X3, NORM, ATTENTION = (ops.overload(name) for name in ("conv3x3", "group_norm_silu", "group_norm_attention"))


@dataclasses.dataclass
class Step:
    """One step; `out` is the number of the value that it writes, `reads` are those it needs."""

    out: int

    @property
    def reads(self) -> tuple[int | None, ...]:
        raise NotImplementedError

    def run(self, v: Values, c: Conditions) -> None:
        raise NotImplementedError


@dataclasses.dataclass
class NormWeights:
    """A GroupNorm(+SiLU) in front of something; stats: the number of its input's statistics, None to take them anew."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool
    stats: int | None = None
    scale_shift: int | None = None  # the condition that scales and shifts

    def of(self, v: Values, c: Conditions) -> tuple:
        """The arguments of `group_norm_silu` after x."""
        scale, shift = (None, None) if self.scale_shift is None else c[self.scale_shift].chunk(2, dim=1)
        stats = None if self.stats is None else v[self.stats]
        return self.weight, self.bias, self.groups, self.eps, None, scale, shift, stats, self.silu


NOTHING = (None, None, 1, 1e-5, None, None, None, None, True)  # no norm


@dataclasses.dataclass
class Conv3x3(Step):
    """(conv(norm(x)) + bias + residual) out_scale by `ops.conv3x3`, or by the library with weights in its own order."""

    name: str
    x: int
    weight: Tensor  # [O, I, 3, 3]
    bias: Tensor  # [O]
    norm: NormWeights | None = None
    add: int | None = None  # the condition that is this convolution's bias, its own included
    residual: int | None = None
    out_scale: float = 1.0
    stats: int | None = None  # where the statistics of y go
    stats_groups: int = 0
    algorithm: str = ""
    packed: Tensor | None = None
    library: LibraryConvolution | None = None

    @property
    def reads(self):
        return self.x, self.residual, self.norm.stats if self.norm else None

    def run(self, v, c):
        x = v[self.x]
        bias = self.bias if self.add is None else c[self.add]
        norm = NOTHING if self.norm is None else self.norm.of(v, c)
        residual = None if self.residual is None else v[self.residual]
        if self.library is not None:
            x = x if self.norm is None else NORM(x, *norm)[0]
            v[self.out] = self.library(x, bias, residual, self.out_scale)
            return
        groups = self.stats_groups if self.stats is not None else 0
        given = (residual, self.out_scale, groups, self.packed, self.algorithm)
        v[self.out], stats, _ = CONV3X3(x, self.weight, bias, *norm, *given)
        if self.stats is not None:
            v[self.stats] = stats


@dataclasses.dataclass
class Halve(Step):
    """DDPM's halving convolution of stride 2."""

    x: int
    convolution: Callable[[Tensor], Tensor]
    end: bool

    @property
    def reads(self):
        return (self.x,)

    def run(self, v, c):
        x = v[self.x]
        v[self.out] = self.convolution(functional.pad(x, (0, 1, 0, 1)) if self.end else x)


@dataclasses.dataclass
class Project(Step):
    """A 1x1 convolution."""

    x: int
    convolution: Callable[[Tensor], Tensor]

    @property
    def reads(self):
        return (self.x,)

    def run(self, v, c):
        v[self.out] = self.convolution(v[self.x])


@dataclasses.dataclass
class Attention(Step):
    """`ops.group_norm_attention`, or the norm and the library's products and attention by one of its back ends."""

    name: str
    x: int
    norm: NormWeights
    qkv: tuple[Tensor, Tensor]
    project: tuple[Tensor, Tensor]
    heads: int
    out_scale: float
    algorithm: str = FUSED
    library: LibraryAttention | None = None

    @property
    def reads(self):
        return self.x, self.norm.stats

    def run(self, v, c):
        if self.library is not None:
            v[self.out] = self.library(v[self.x], NORM(v[self.x], *self.norm.of(v, c))[0])
            return
        n, stats = self.norm, None if self.norm.stats is None else v[self.norm.stats]
        scale = (self.project[0].shape[1] // self.heads) ** -0.5
        given = (*self.qkv, *self.project, self.heads, scale, self.out_scale, stats)
        v[self.out] = ATTENTION(v[self.x], n.weight, n.bias, n.groups, n.eps, *given)[0]


@dataclasses.dataclass
class Normalise(Step):
    """`ops.group_norm_silu` where its result is resampled before it is convolved."""

    x: int
    norm: NormWeights

    @property
    def reads(self):
        return self.x, self.norm.stats

    def run(self, v, c):
        v[self.out] = NORM(v[self.x], *self.norm.of(v, c))[0]


@dataclasses.dataclass
class Join(Step):
    """Two images' channels, one after the other."""

    parts: tuple[int, int]

    @property
    def reads(self):
        return self.parts

    def run(self, v, c):
        v[self.out] = torch.cat([v[i] for i in self.parts], 1)


@dataclasses.dataclass
class Apply(Step):
    """A module or function as it is, on one or two values; in float32 where it has weights of its own."""

    call: Callable[..., Tensor]
    given: tuple[int | None, ...]

    @property
    def reads(self):
        return self.given

    def run(self, v, c):
        values = [None if i is None else v[i] for i in self.given]
        if isinstance(self.call, nn.Module):
            dtype = next(x.dtype for x in values if x is not None)
            y = self.call(*[None if x is None else x.float() for x in values]).to(dtype)
        else:
            y = self.call(*values)
        v[self.out] = y


def double(x: Tensor) -> Tensor:
    """Nearest neighbour to twice the size, channels-last."""
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def halve(x: Tensor) -> Tensor:
    """Mean of 2x2 pixels."""
    return functional.avg_pool2d(x, 2)


def scaled_sum(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(a + b) scale."""
    return lambda a, b: (a + b).mul_(scale) if scale != 1 else a + b

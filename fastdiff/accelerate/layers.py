"""The layers that `accelerate` serves by fused ops, and how a run of them is applied."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from fastdiff import ops
from fastdiff.accelerate.derived import cacheable, derived
from fastdiff.accelerate.swap import Fast, plain
from fastdiff.ops._register import functorch_active

WINOGRAD = "winograd4"
# Below so many pixels in the batch, or input channels, reading the packed weights takes longer than it saves.
PIXELS, CHANNELS = 64, 16


def _float32_norm(x: Tensor) -> bool:
    """Autocast computes GroupNorm in float32 on every device but CPUs, and returns that."""
    return x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)


class GroupNorm(Fast, nn.GroupNorm):
    """nn.GroupNorm by `fastdiff.ops.group_norm_silu`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return norm_silu(self, x.float() if _float32_norm(x) else x, silu=False)


class Conv2d(Fast, nn.Conv2d):
    """A 3x3 convolution by `fastdiff.ops.conv3x3` where its packed weights serve: eager float32 inference on CPUs."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return conv3x3(self, x)[0] if packs(self, x) else super().forward(x)


class Sequential(Fast, nn.Sequential):
    """nn.Sequential with each GroupNorm and the SiLU behind it in one op."""

    def forward(self, x):
        return in_turn(tuple(self._modules.values()), x)


def is_norm(layer: object) -> bool:
    return isinstance(layer, GroupNorm) and plain(layer)


def is_silu(layer: object) -> bool:
    return layer is functional.silu or (
        isinstance(layer, nn.SiLU) and type(layer).forward is nn.SiLU.forward and plain(layer)
    )


def is_absent(layer: object) -> bool:
    """Dropout that drops nothing now."""
    idle = isinstance(layer, _DropoutNd) and (not layer.training or layer.p == 0)
    return (idle or type(layer) is nn.Identity) and plain(layer)  # type: ignore[arg-type]


def norm_silu(norm: nn.GroupNorm, x: Tensor, silu: bool = True, **given) -> Tensor:
    """SiLU(norm(x)); given: `add`, `scale`, `shift` of `ops.group_norm_silu`."""
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, **given, silu=silu)


def as_norm(norm: nn.GroupNorm, **given) -> ops.Norm:
    return ops.Norm(norm.weight, norm.bias, norm.num_groups, norm.eps, **given)


def has_packed() -> bool:
    """Packed weights are served here: the native code was built."""
    return WINOGRAD in ops.conv3x3_algorithms(torch.float32)


def eager_inference(x: Tensor) -> bool:
    """Eager float32 inference on a CPU, where parameters may be prepared once and kept."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or functorch_active():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def packs(layer: object, x: Tensor) -> bool:
    """`layer` is a convolution that packed weights serve for images of x's size."""
    if not isinstance(layer, Conv2d) or not eager_inference(x):
        return False
    fits = x.dim() == 4 and layer.in_channels >= CHANNELS and x.numel() >= PIXELS * x.shape[1]
    return fits and layer.weight.dtype == x.dtype and cacheable(layer.weight)


def _pack(weight: Tensor) -> Tensor:
    return ops.conv3x3_pack(weight, WINOGRAD)


def conv3x3(layer: nn.Conv2d, x: Tensor, add: Tensor | None = None, **given) -> tuple[Tensor, Tensor | None]:
    """layer(x) + add [N, O], and its statistics; given: `norm`, `residual`, ... of `ops.conv3x3`. Where `packs` is true."""
    if not layer.weight.is_contiguous():  # PyTorch's convolution too lets the weights decide
        x = x.contiguous(memory_format=torch.channels_last)
    bias = layer.bias if add is None else add if layer.bias is None else layer.bias + add
    packed = derived(layer, (layer.weight,), _pack)
    return ops.conv3x3(x, layer.weight, bias, packed=packed, algorithm=WINOGRAD, **given)


def in_turn(layers: Sequence[Callable], x):
    """layers[-1](...layers[0](x)), with GroupNorm, SiLU and a packed convolution behind them as one op."""
    i = 0
    while i < len(layers):
        if i + 1 == len(layers) or not (is_norm(layers[i]) and is_silu(layers[i + 1])):
            x, i = layers[i](x), i + 1
            continue
        norm, i = layers[i], i + 2
        after = i
        while after < len(layers) and is_absent(layers[after]):
            after += 1
        if after < len(layers) and packs(layers[after], x) and plain(layers[after]):  # type: ignore[arg-type]
            x, i = conv3x3(layers[after], x, norm=as_norm(norm))[0], after + 1  # type: ignore[arg-type]
        else:
            x = norm_silu(norm, x.float() if _float32_norm(x) else x)  # type: ignore[arg-type]
    return x

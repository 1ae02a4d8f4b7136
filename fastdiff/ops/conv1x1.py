"""conv1x1: a projection of every pixel's channels, with weights that are packed once.

y[n, o, r, s] = sum_i weight[o, i] x[n, i, r, s] + bias[o]
"""

import torch

from fastdiff.ops import _register

BLOCK = 64  # output channels that lie next to each other
UNIT = 16  # what their number is a multiple of


def reference(x, packed, bias):
    weight = _unpacked(packed).to(x.dtype)
    y = (x.permute(0, 2, 3, 1) @ weight + bias.to(x.dtype)).contiguous()
    return y.permute(0, 3, 1, 2)


def _fake(x, packed, bias):
    n, _, height, width = x.shape
    return x.new_empty(n, height, width, len(bias)).permute(0, 3, 1, 2)


def _blocks(outputs):
    return [min(BLOCK, outputs - first) for first in range(0, outputs, BLOCK)]


def _unpacked(packed):
    """[I, O], an output channel a column."""
    inputs, outputs = packed.shape
    parts = packed.flatten().split([inputs * size for size in _blocks(outputs)])
    return torch.cat([part.view(inputs, -1) for part in parts], 1)


_register.define("conv1x1", "(Tensor x, Tensor packed, Tensor bias) -> Tensor", reference, _fake)
_register.compose("conv1x1", reference)


def conv1x1_pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [O, I] -> [I, O], in blocks of 64 output channels, for `conv1x1`. O is a multiple of 16."""
    if weight.dim() != 2 or not weight.is_floating_point() or len(weight) % UNIT or not weight.numel():
        raise ValueError(
            f"weight: expected floating-point [O, I] with O a multiple of {UNIT}, got {weight.dtype} {tuple(weight.shape)}"
        )
    return torch.cat([part.mT.flatten() for part in weight.detach().split(BLOCK)]).view(weight.shape[1], len(weight))


def conv1x1_serves() -> bool:
    """Whether float32 images on this CPU have a kernel of ours."""
    return _register.serving("conv1x1", "cpu") == "c++"


def conv1x1(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution of x: W x + b at every pixel.

    Args:
        x: [N, I, H, W], any strides; fastest channels-last, or as channels of a wider such image.
        packed: `conv1x1_pack(weight)`, [I, O].
        bias: [O].

    Returns: [N, O, H, W] of x's dtype, channels-last; not differentiable. Float32 on CPUs by a kernel of ours, whose bits
        depend on neither batch nor threads, with contiguous packed and bias in float32; all else is PyTorch's product.

    Raises: TypeError, ValueError naming argument, value and remedy.

    Bytes moved: x once for every 64 output channels, from the cache where 96 pixels of it fit; y written once for every 256
    input channels.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor [N, I, H, W], got {x.dtype} of shape {tuple(x.shape)}")
    if packed.dim() != 2 or packed.shape[0] != x.shape[1] or packed.shape[1] % UNIT:
        raise ValueError(
            f"packed: {tuple(packed.shape)} is not [{x.shape[1]}, O] with O a multiple of {UNIT}; use conv1x1_pack(weight)"
        )
    if bias.shape != packed.shape[1:]:
        raise ValueError(f"bias: {tuple(bias.shape)} does not fit packed {tuple(packed.shape)}; expected {packed.shape[1:]}")
    for name, t in (("packed", packed), ("bias", bias)):
        if t.dtype != torch.float32 or not t.is_contiguous() or t.device != x.device:
            raise TypeError(
                f"{name}: expected contiguous torch.float32 on {x.device}, got {t.dtype} on {t.device} "
                f"with strides {t.stride()}; use .float().contiguous()"
            )
    return torch.ops.fastdiff.conv1x1(x, packed, bias)

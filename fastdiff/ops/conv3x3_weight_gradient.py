"""conv3x3_weight_gradient: what a 3x3 convolution's weights learn from a batch.

    dw[o, i, u, v] = sum_{n, r, s} dy[n, o, r, s] h[n, i, r + u - 1, s + v - 1]

by the transpose of Winograd's F(4x4, 3x3) in its weights, G^T [sum over tiles of (A dy A^T) (B^T h B)] G: a quarter of the
multiplications. Lavin and Gray 2016; docs/conv3x3.md.
"""

import torch

from fastdiff.ops import _register


def reference(dy, h):
    weight = h.new_empty((dy.shape[1], h.shape[1], 3, 3))
    if h.numel() == 0 or dy.numel() == 0:
        return torch.zeros_like(weight, dtype=_wide(h), memory_format=torch.channels_last)
    like = weight.to(_wide(h))
    arguments = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    dw = torch.ops.aten.convolution_backward(dy.to(_wide(h)), h.to(_wide(h)), like, *arguments)[1]
    return dw.contiguous(memory_format=torch.channels_last)


def _wide(h):
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _fake(dy, h):
    shape = dy.shape[1], h.shape[1], 3, 3
    return h.new_empty(shape, dtype=_wide(h)).contiguous(memory_format=torch.channels_last)


_register.define("conv3x3_weight_gradient", "(Tensor dy, Tensor h) -> Tensor", reference, _fake)
_register.compose("conv3x3_weight_gradient", reference)


def conv3x3_weight_gradient(dy: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The gradient [O, I, 3, 3] of the weights of a 3x3 convolution (stride 1, padding 1) of h whose result has gradient dy.

    Args:
        dy: [N, O, H, W], any strides.
        h: [N, I, H, W], of dy's dtype.

    Returns: float32 (float64 for float64), channels-last; not differentiable. On CPUs sums are float32, by Winograd's
        algorithm, in an order that the shape alone decides; float64 and other devices: PyTorch's.

    Raises: TypeError, ValueError naming argument, value and remedy.

    Bytes moved: dy and h read once, dw written once for every 64 tiles of 4x4 pixels.
    """
    for name, t in (("dy", dy), ("h", h)):
        if t.dim() != 4 or not t.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor [N, C, H, W], got {t.dtype} of shape {tuple(t.shape)}"
            )
    if dy.shape[0] != h.shape[0] or dy.shape[2:] != h.shape[2:]:
        raise ValueError(f"dy: {tuple(dy.shape)} does not fit h {tuple(h.shape)}; N, H and W are the same")
    if dy.dtype != h.dtype:
        raise TypeError(f"dy: is {dy.dtype}, h {h.dtype}; use dy.to({h.dtype})")
    return torch.ops.fastdiff.conv3x3_weight_gradient(dy, h)

"""Convolutions by PyTorch's library with weights in its own order: oneDNN's on CPUs, cuDNN's on GPUs."""

import torch
from torch import Tensor
from torch.nn import functional


def orders(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes weights of this type in its own order here; bfloat16 needs AVX-512 or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class LibraryConvolution:
    """1x1, and 3x3 of stride 1 or 2, with residual and scale behind.

    On CPUs the weights are reordered once, and images are convolved one by one where the library would choose another
    order of summation for another batch: an image does not depend on its batch. bfloat16 that oneDNN does not serve here is
    convolved in float32, which is faster than PyTorch's own loops.
    """

    def __init__(self, weight: Tensor, bias: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 1):
        cpu = weight.device.type == "cpu"
        if cpu and weight.dtype == torch.bfloat16 and not orders(weight.dtype):
            weight = weight.float()
        self.stride, self.padding, self.bias = [stride, stride], [padding, padding], bias.to(weight.dtype)
        self.dtype, self.ordered = weight.dtype, cpu and orders(weight.dtype)
        self.weight = weight
        if self.ordered:
            shape = [1, weight.shape[1], *size]
            given = (self.padding, self.stride, [1, 1], 1, shape)
            self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.contiguous().to_mkldnn(), *given)  # type: ignore[call-arg]

    def __call__(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out_scale: float = 1.0,
    ) -> Tensor:
        """bias: [O] or [N, O]."""
        if x.dtype != self.dtype:
            residual = None if residual is None else residual.to(self.dtype)
            return self(x.to(self.dtype), bias, residual, out_scale).to(x.dtype)
        bias = self.bias if bias is None else bias.to(x.dtype)
        if not self.ordered:
            y = self._plain(x, bias, residual)
        elif len(x) == 1:
            y = self._one(x, bias.reshape(-1), residual)
        else:
            parts = [None] * len(x) if residual is None else residual.split(1)
            biases = [bias] * len(x) if bias.dim() == 1 else bias.unbind(0)
            y = torch.cat([self._one(*given) for given in zip(x.split(1), biases, parts, strict=True)])
        return y if out_scale == 1 else y.mul_(out_scale)

    def _one(self, x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        """One image, bias [O]."""
        call = torch.ops.mkldnn._convolution_pointwise
        geometry = (self.padding, self.stride, [1, 1], 1)
        if residual is None:
            return call(x, self.weight, bias, *geometry, "none", [], "")
        return call.binary(x, residual, self.weight, bias, *geometry, "add", None, None, [], None)

    def _plain(self, x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        shared = bias if bias.dim() == 1 else None
        y = functional.conv2d(x, self.weight, shared, self.stride, self.padding)
        y = y if shared is not None else y + bias[..., None, None]
        return y if residual is None else y + residual

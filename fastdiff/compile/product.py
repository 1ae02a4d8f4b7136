"""Convolutions on CPUs as products of matrices: small ones by BLAS, since oneDNN takes 50 us to find its code, for every
image anew; other 1x1 ones by `ops.conv1x1`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import ops
from fastdiff.compile.library import LibraryConvolution

CONV1X1 = ops.overload("conv1x1")
SMALL = 6e6  # operations for an image, below which a product is faster
ALIGNED = 16  # channels in 64 bytes: BLAS may sum in another order where an image begins elsewhere


class Product:
    """A convolution of any size and stride of float32 images that are channels-last: one product for each image.

    One call of BLAS for each image: of a batch's products it may share out the images among threads, of one product's sum
    its terms. So the order of summation is the same in every batch, and so is the alignment where channels are multiples of
    `ALIGNED`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, padding: int):
        self.kernel, self.stride, self.padding, self.bias = weight.shape[-1], stride, padding, bias
        self.matrix = weight.permute(0, 2, 3, 1).flatten(1).mT.contiguous()  # [kernel kernel I, O]

    def __call__(self, x: Tensor) -> Tensor:
        x = functional.pad(x, [self.padding] * 4) if self.padding else x
        pixels = x.permute(0, 2, 3, 1)  # [N, H, W, I]
        if self.kernel > 1 or self.stride > 1:
            windows = pixels.unfold(1, self.kernel, self.stride).unfold(2, self.kernel, self.stride)
            pixels = windows.permute(0, 1, 2, 4, 5, 3)  # [N, H', W', kernel, kernel, I]
        n, h, w = pixels.shape[:3]
        terms, outputs = self.matrix.shape
        y = x.new_empty(n, h * w, outputs)
        for image, rows in zip(y, pixels.reshape(n, h * w, terms), strict=True):
            torch.addmm(self.bias, rows, self.matrix, out=image)
        return y.view(n, h, w, outputs).permute(0, 3, 1, 2)


class Projection:
    """A 1x1 convolution of float32 images by `ops.conv1x1`."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.packed, self.bias = ops.conv1x1_pack(weight.flatten(1)), bias.to(weight.dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return CONV1X1(x, self.packed, self.bias)


def convolution(
    weight: Tensor, bias: Tensor, size: tuple[int, int], stride: int = 1, padding: int = 1
) -> Callable[[Tensor], Tensor]:
    """The fastest for images of about `size`."""
    operations = 2 * weight.numel() * (size[0] // stride) * (size[1] // stride)
    aligned = not any(channels % ALIGNED for channels in weight.shape[:2])
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and aligned:
        if operations <= SMALL:
            return Product(weight, bias, stride, padding)
        if weight.shape[2:] == (1, 1) and (stride, padding) == (1, 0) and ops.conv1x1_serves():
            return Projection(weight, bias)
    return LibraryConvolution(weight, bias, size, stride, padding)

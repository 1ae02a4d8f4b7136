"""Convolution, dropout and fully connected layer as the U-Net has them: PyTorch's, computed by what is fastest or, in
inference on CPUs, the same for every batch.
"""

import math
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import ops

ONEDNN = torch.backends.mkldnn.is_available()
TRAINING = "winograd4_lean"  # of `ops.conv3x3`: the one whose weights are packed in moments
SERVED = TRAINING in ops.conv3x3_algorithms(torch.float32)  # a constant of the process: compilers cannot trace the question
# Of AMX, which multiplies bfloat16 8 times as fast as float32, others twice. Not every build of PyTorch can be asked.
MATRIX_UNIT = bool(getattr(torch._C._cpu, "_is_amx_tile_supported", bool)())
PIXELS = 512  # of a batch, below which transforming the weights takes longer than products of bfloat16 do
WIDE = 32  # channels, below which it gains nothing
ROWS = 16  # matrices in `Linear` get whole multiples of so many rows, see _order_matters


def initialise(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Uniform with variance gain / fan_average (DDPM's initialiser); gain 0 makes a branch start as the identity."""
    if gain == 0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(gain))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _order_matters(x: Tensor) -> bool:
    """True in eager float32 inference on CPUs, where an image shall not depend on the batch it is in.

    There PyTorch picks algorithms, and with them the order of summation, by batch size: another library for convolutions
    of a single small image, other blockings for 1x1 convolutions and for matrices of few rows. The branches below keep one
    algorithm for all batch sizes, and the packaged model's images are equal bit for bit.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


class Conv2d(nn.Conv2d):
    """Same-size convolution (stride 1) or halving convolution (stride 2), initialised as in DDPM.

    Images are channels-last here, and so is the weight from the start: libraries would copy it to that layout in every call.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, gain: float = 1.0, padding: int | None = None
    ):
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if padding is None else padding)
        initialise(self, gain)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self._learns_by_winograd(x):
            x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
            return ops.conv3x3(x, self.weight, self.bias, algorithm=TRAINING)[0]
        if not _order_matters(x):
            return super().forward(x)
        if self.kernel_size == (1, 1):
            return self._pointwise(x)
        if x.shape[0] > 1:
            return super().forward(x)
        assert not isinstance(self.padding, str)
        return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)

    def _learns_by_winograd(self, x: Tensor) -> bool:
        """Whether weights that change at every step are transformed at every step: by their shape, never by a clock.

        So a resumed run computes what the run it continues would have. Under autocast too, in float32 inside, where there
        are pixels enough: F(4x4, 3x3) multiplies a quarter as often, worth more than products that are twice as fast.
        """
        if not (SERVED and torch.is_grad_enabled() and self.weight.requires_grad) or x.device.type != "cpu":
            return False
        usual = self.kernel_size == (3, 3) and self.stride == (1, 1) and self.padding == (1, 1)
        if not usual or min(self.in_channels, self.out_channels) < WIDE or self.weight.dtype != torch.float32:
            return False
        if torch.is_autocast_enabled("cpu"):
            return not MATRIX_UNIT and x.shape[0] * x.shape[2] * x.shape[3] >= PIXELS
        return x.dtype == torch.float32

    def _pointwise(self, x: Tensor) -> Tensor:
        """A 1x1 convolution as one matrix product per image, which is channels-last already."""
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        weight = self.weight.reshape(1, -1, c).mT.expand(b, -1, -1)
        assert self.bias is not None
        y = torch.baddbmm(self.bias.expand(b, h * w, -1), rows, weight)
        return y.reshape(b, h, w, -1).permute(0, 3, 1, 2)


class Dropout(nn.Dropout):
    """Dropout; on CPUs by `ops.philox_normal` from one number of PyTorch's generator, which draws them one by one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or not 0 < self.p < 1:
            return super().forward(x)
        b, c, h, w = x.shape
        seed = torch.randint(2**62, (1,))
        z = ops.philox_normal(seed, 0, (b, h, w, c), domain=ops.Domain.DROPOUT)
        kept = z[0].permute(0, 3, 1, 2) > statistics.NormalDist().inv_cdf(self.p)
        return x * kept.to(x.dtype).div_(1 - self.p)


class Linear(nn.Linear):
    """Fully connected layer, initialised as in DDPM."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0, bias: bool = True):
        super().__init__(inputs, outputs, bias)
        initialise(self, gain)

    def forward(self, x: Tensor) -> Tensor:
        if not _order_matters(x):
            return super().forward(x)
        return super().forward(functional.pad(x, (0, 0, 0, -len(x) % ROWS)))[: len(x)]

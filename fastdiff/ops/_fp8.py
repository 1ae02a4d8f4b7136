"""conv3x3 by "fp8": both operands in eight bits, E4M3 (4 exponent bits, 3 of mantissa, no infinity, largest 448).

    q[o] = e4m3(weight[o] / d[o]),   d[o] = max |weight[o]| / 448              one scale an output channel
    p = e4m3(clamp(f h, -448, 448)), f = 2^(3 - ceil log2 max_c(|gamma_c| + |beta_c|))
    z[o] = d[o] / f (q[o] * p) + bias[o]                                       * convolves, sums in float32

The scale f of h needs no data: before SiLU h is about N(beta, gamma) whatever the image, and SiLU makes nothing larger. f
brings the largest channel's |gamma| + |beta| to 4 ... 8, so that h saturates 56 standard deviations out at the earliest and
leaves a `scale` and `shift` room, and is a normal number down to 1/256 of that size. e4m3 rounds to nearest, ties to even.
"""

import math

import torch
from torch.nn import functional

from fastdiff.ops import _register

LARGEST = 448.0
UNIT = 16  # bytes: what an input channel's padding and a row are multiples of, so that 128 bits are read at a time
TAIL = 16  # bytes behind a row's weights: d[o], f, both float32, and padding
TYPES = (torch.bfloat16, torch.float16)  # of x and y
USUAL = 8.0  # f for gamma = 1, beta = 0


def served(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of compute capability 8.9 or later, as sm_80 is not, and the kernel is there."""
    there = torch.version.hip is None and torch.cuda.is_available() and _register.serving("conv3x3", "cuda") == "triton"
    return there and torch.cuda.get_device_capability(device) >= (8, 9)


def padded(inputs: int) -> int:
    return -(-inputs // UNIT) * UNIT


def packed_shape(weight: torch.Tensor) -> tuple[int, int]:
    """[O, 9 I + TAIL], I rounded up: a row holds an output channel's weights, tap by tap, and its two scales."""
    return weight.shape[0], 9 * padded(weight.shape[1]) + TAIL


def e4m3(v: torch.Tensor) -> torch.Tensor:
    """v to the nearest E4M3 number, the largest beyond it, NaN for NaN."""
    return v.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def factor_of(norm_weight: torch.Tensor, norm_bias: torch.Tensor) -> float:
    """f: a power of two, so that nothing is rounded but once."""
    largest = (norm_weight.detach().double().abs() + norm_bias.detach().double().abs()).max().item()
    if not 0 < largest < math.inf:
        return USUAL
    mantissa, exponent = math.frexp(largest)
    exponent -= mantissa == 0.5
    return 2.0 ** (3 - min(60, max(-60, exponent)))


def pack(weight: torch.Tensor) -> torch.Tensor:
    """E4M3 [O, 9 I + TAIL]; of the last 16 bytes of a row the first eight are two float32 numbers."""
    outputs, inputs = weight.shape[:2]
    rows = weight.double().permute(0, 2, 3, 1)  # [O, 3, 3, I]
    scale = rows.abs().amax((1, 2, 3)).div(LARGEST).float()
    scale = torch.where(scale > 0, scale, 1.0)
    packed = torch.zeros(packed_shape(weight), dtype=torch.uint8, device=weight.device).view(torch.float8_e4m3fn)
    q = e4m3(rows / scale.double()[:, None, None, None])
    packed[:, :-TAIL].view(outputs, 3, 3, padded(inputs))[..., :inputs].copy_(q)
    tail = tails(packed)
    tail[:, 0], tail[:, 1] = scale, USUAL
    return packed


def tails(packed: torch.Tensor) -> torch.Tensor:
    """float32 [O, 2], where they lie in `packed`: d and f."""
    return packed.view(torch.float32)[:, -TAIL // 4 : -TAIL // 4 + 2]


def convolve(h: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """z without bias [N, O, H, W] for h [N, I, H, W], float32 or float64: products are exact, sums are of h's type."""
    outputs, inputs = len(packed), h.shape[1]
    scale, factor = tails(packed).to(h.dtype).unbind(1)
    q = packed[:, :-TAIL].reshape(outputs, 3, 3, padded(inputs))[..., :inputs].to(h.dtype).permute(0, 3, 1, 2)
    p = e4m3(h * factor[0]).to(h.dtype)
    return functional.conv2d(p, q, padding=1) * (scale / factor)[:, None, None]

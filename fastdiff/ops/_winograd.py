"""The weights of conv3x3 as its algorithms want them: Winograd's F(m, 3), result = A^T [(G g) (B^T d)] in each dimension.

By m + 1 finite points and infinity. csrc/cpu has A and B of the same points. "fp8" has a file of its own.
"""

import torch
from torch.nn import functional

from fastdiff.ops import _fp8, _register

ALGORITHMS = ("direct", "winograd4", "winograd4_lean", "winograd2", "fp8")
_FOUR = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
POINTS = {"winograd4": _FOUR, "winograd4_lean": _FOUR, "winograd2": (0.0, 1.0, -1.0)}
OPERAND = {
    "winograd4": torch.float32,
    "winograd4_lean": torch.float32,
    "winograd2": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
BLOCK = {"winograd4": 64, "winograd4_lean": 16, "winograd2": 64}  # output channels next to each other
PACKING = 2  # of what `_pack` makes: raised when that changes, so that programs saved before are packed again
UNIT = 16  # what the output channels of the last block are a multiple of


def at_points(points: tuple[float, ...]) -> torch.Tensor:
    """G [m + 2, 3]: g0 + g1 p + g2 p^2 at every point, then g2. Its 1 / prod_j (p_i - p_j) are in A."""
    return torch.tensor([*[[1.0, p, p * p] for p in points], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _kept(algorithm):
    """What is kept of a filter g is K g K^T: its values at the points, or g in units in which they are 0, +-1, +-2."""
    if algorithm == "winograd4_lean":
        return torch.tensor([1.0, 0.5**0.5, 0.5], dtype=torch.float64).diag()
    return at_points(POINTS[algorithm])


def packed_shape(weight: torch.Tensor, algorithm: str) -> tuple[int, ...]:
    """[values kept of a filter, I, O]; I is even for bfloat16, whose products take two input channels at once."""
    if algorithm == "fp8":
        return _fp8.packed_shape(weight)
    values, step = {"winograd4": (36, 1), "winograd4_lean": (9, 1), "winograd2": (16, 2)}[algorithm]
    return values, -(-weight.shape[1] // step) * step, -(-weight.shape[0] // UNIT) * UNIT


def check_algorithm(algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r} is not known here; use {' or '.join(ALGORITHMS)}")


def _pack(weight, algorithm, transposed):
    """direct: as it is. fp8: see there. Winograd: blocks of output channels, padded with zeros, rounded once.

    winograd4, winograd2: [values, I / step, BLOCK, step]. winograd4_lean: [I, values, BLOCK].
    """
    check_algorithm(algorithm)
    weight = weight.transpose(0, 1).flip(2, 3) if transposed else weight
    if algorithm == "direct":
        return weight.clone(memory_format=torch.contiguous_format)
    if algorithm == "fp8":
        return _fp8.pack(weight)
    values, inputs, outputs = packed_shape(weight, algorithm)
    step, size = 2 if algorithm == "winograd2" else 1, BLOCK[algorithm]
    kept = _kept(algorithm).to(weight.device)
    packed, at = weight.new_zeros(values * inputs * outputs, dtype=OPERAND[algorithm]), 0
    for first in range(0, outputs, size):
        part, width = weight[first : first + size], min(size, outputs - first)
        block = packed[at : at + values * inputs * width]
        made = (kept @ part.double() @ kept.T).flatten(2).permute(2, 1, 0)  # [values, I, O]
        made = functional.pad(made, (0, width - len(part), 0, inputs - made.shape[1]))
        if algorithm == "winograd4_lean":
            block.view(inputs, values, width).copy_(made.transpose(0, 1))
        else:
            shape = values, inputs // step, step, width
            block.view(values, inputs // step, width, step).copy_(made.view(shape).transpose(2, 3))
        at += block.numel()
    return packed.view(values, inputs, outputs)


def _fake_pack(weight, algorithm, transposed):
    weight = weight.transpose(0, 1) if transposed else weight
    if algorithm == "direct":
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    return weight.new_empty(packed_shape(weight, algorithm), dtype=OPERAND[algorithm])


_register.define("conv3x3_pack", "(Tensor weight, str algorithm, bool transposed) -> Tensor", _pack, _fake_pack)
_register.compose("conv3x3_pack", _pack)

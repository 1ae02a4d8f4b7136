"""The weights of conv3x3 as its algorithms want them: Winograd's F(m, 3), result = A^T [(G g) (B^T d)] in each dimension.

By m + 1 finite points and infinity. csrc/cpu has A and B of the same points. "fp8" has a file of its own.
"""

import torch
from torch.nn import functional

from fastdiff.ops import _fp8, _register

_FOUR = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
INTEGERS = "winograd4_int16"
SIX = "winograd6"
ALGORITHMS = ("direct", "winograd4", "winograd4_lean", SIX, INTEGERS, "winograd2", "fp8")
POINTS = {"winograd4": _FOUR, "winograd4_lean": _FOUR, INTEGERS: _FOUR, "winograd2": (0.0, 1.0, -1.0)}
POINTS[SIX] = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # its tiles of 4x4 have the first five
FILTERS = {"winograd4_lean": (1.0, 0.5**0.5, 0.5), SIX: (1.0, 1.0, 1.0)}  # kept as they are, but for units
EVEN = (1.0, 0.75, 0.75, 0.375, 0.375, 1.0)  # factors of the integers' rows of G, which make them of about one size
SHARED = 64  # input channels that are summed as integers
OPERAND = {
    "winograd4": torch.float32,
    "winograd4_lean": torch.float32,
    SIX: torch.float32,
    INTEGERS: torch.int16,
    "winograd2": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
# output channels next to each other
BLOCK = {"winograd4": 64, "winograd4_lean": 16, SIX: 16, INTEGERS: 64, "winograd2": 64}
PACKING = 2  # of what `_pack` makes: raised when that changes, so that programs saved before are packed again
UNIT = 16  # what the output channels of the last block are a multiple of


def at_points(points: tuple[float, ...]) -> torch.Tensor:
    """G [m + 2, 3]: g0 + g1 p + g2 p^2 at every point, then g2. Its 1 / prod_j (p_i - p_j) are in A."""
    return torch.tensor([*[[1.0, p, p * p] for p in points], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _kept(algorithm):
    """What is kept of a filter g is K g K^T: its values at the points, or g in units in which they are 0, +-1, +-2."""
    if algorithm in FILTERS:
        return torch.tensor(FILTERS[algorithm], dtype=torch.float64).diag()
    g = at_points(POINTS[algorithm])
    return torch.tensor(EVEN, dtype=torch.float64)[:, None] * g if algorithm == INTEGERS else g


def packed_shape(weight: torch.Tensor, algorithm: str) -> tuple[int, ...]:
    """[values kept of a filter, I, O]; I is even for 16-bit types, whose products take two input channels at once.

    winograd4_int16: [1, 1, values I O + 2 O + 2 I]; behind the integers a float32 for each O, their unit, and for each I,
    the factor of its pixels. winograd6: [1, values I, O], so that winograd4_lean's, in other units, are told from them.
    """
    if algorithm == "fp8":
        return _fp8.packed_shape(weight)
    values, inputs, outputs = _sizes(weight, algorithm)
    if algorithm == SIX:
        return 1, values * inputs, outputs
    return (1, 1, values * inputs * outputs + 2 * (outputs + inputs)) if algorithm == INTEGERS else (values, inputs, outputs)


def _sizes(weight, algorithm):
    step = 2 if OPERAND[algorithm].itemsize == 2 else 1
    inputs, outputs = -(-weight.shape[1] // step) * step, -(-weight.shape[0] // UNIT) * UNIT
    return _kept(algorithm).shape[0] ** 2, inputs, outputs


def check_algorithm(algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r} is not known here; use {' or '.join(ALGORITHMS)}")


def _factors(weight: torch.Tensor) -> torch.Tensor:
    """[O, I, 3, 3] -> [I]: the size of each input channel's filters, which multiplies its pixels in place of them.

    So the integers of all filters are of one size, and a pixel's as large as what it adds to a result: channels may share a
    unit whatever the sizes of the network's weights and activations.
    """
    size = weight.double().square().mean((0, 2, 3)).sqrt()
    return torch.where(size.isfinite() & (size > 0), size, 1.0).float().double()


def _unit(u: torch.Tensor) -> torch.Tensor:
    """[values, I, O] -> [O]: the least that `u` may be divided by where rounded quotients are to be added up in 32 bits.

    SHARED of them, each times a number of 14 bits and a sign. The same for all values: a factor of a result.
    """
    chunks = functional.pad(u.abs(), (0, 0, 0, -u.shape[1] % SHARED)).unflatten(1, (-1, SHARED))
    least = torch.maximum(chunks.sum(2).amax((0, 1)) / (2**17 - SHARED), u.abs().amax((0, 1)) / (2**15 - 1))
    return least.clamp_min(2.0**-100).float().double()  # at least that for filters that are 0, or as good as 0


def _pack(weight, algorithm, transposed):
    """direct: as it is. fp8: see there. Winograd: blocks of output channels, padded with zeros, rounded once.

    winograd4, winograd4_int16, winograd2: [values, I / step, BLOCK, step]. winograd4_lean, winograd6: [I, values, BLOCK].
    """
    check_algorithm(algorithm)
    weight = weight.transpose(0, 1).flip(2, 3) if transposed else weight
    if algorithm == "direct":
        return weight.clone(memory_format=torch.contiguous_format)
    if algorithm == "fp8":
        return _fp8.pack(weight)
    packed, at, units = weight.new_empty(packed_shape(weight, algorithm), dtype=OPERAND[algorithm]), 0, []
    flat, step = packed.view(-1), 2 if packed.dtype.itemsize == 2 else 1
    for made in _blocks(weight / _factors(weight)[:, None, None] if algorithm == INTEGERS else weight, algorithm):
        if algorithm == INTEGERS:
            units.append(_unit(made))
            made = (made / units[-1]).round_()
        made = made.transpose(0, 1) if algorithm in FILTERS else made.unflatten(1, (-1, step)).transpose(2, 3)
        flat[at : at + made.numel()].view(made.shape).copy_(made)
        at += made.numel()
    if algorithm == INTEGERS:
        factors = functional.pad(_factors(weight), (0, weight.shape[1] % 2))
        flat[at:].view(torch.float32).copy_(torch.cat([*units, factors]))
    return packed


def _blocks(weight, algorithm):
    """[values, I, O] in float64 for each block of output channels, padded with zeros."""
    _, inputs, outputs = _sizes(weight, algorithm)
    kept, size = _kept(algorithm).to(weight.device), BLOCK[algorithm]
    for first in range(0, outputs, size):
        part = weight[first : first + size]
        made = (kept @ part.double() @ kept.T).flatten(2).permute(2, 1, 0)
        yield functional.pad(made, (0, min(size, outputs - first) - len(part), 0, inputs - made.shape[1]))


def _fake_pack(weight, algorithm, transposed):
    weight = weight.transpose(0, 1) if transposed else weight
    if algorithm == "direct":
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    return weight.new_empty(packed_shape(weight, algorithm), dtype=OPERAND[algorithm])


_register.define("conv3x3_pack", "(Tensor weight, str algorithm, bool transposed) -> Tensor", _pack, _fake_pack)
_register.compose("conv3x3_pack", _pack)

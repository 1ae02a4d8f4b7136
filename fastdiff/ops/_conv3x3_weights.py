"""The algorithms of conv3x3, which of them are served where, and the weights as each of them wants them."""

from typing import NamedTuple

import torch

from fastdiff.ops import _fp8, _register
from fastdiff.ops._winograd import ALGORITHMS, INTEGERS, OPERAND, SIX, check_algorithm, packed_shape


class Norm(NamedTuple):
    """What `group_norm_silu` applies to the input of `conv3x3`; see there for each argument."""

    weight: torch.Tensor  # [I]
    bias: torch.Tensor  # [I]
    groups: int
    eps: float = 1e-5
    add: torch.Tensor | None = None  # [N, I]
    scale: torch.Tensor | None = None  # [N, I]
    shift: torch.Tensor | None = None  # [N, I]
    stats: torch.Tensor | None = None  # [N, groups, 2]
    silu: bool = True


def conv3x3_pack(
    weight: torch.Tensor, algorithm: str = "direct", transposed: bool = False, norm: Norm | None = None
) -> torch.Tensor:
    """The weights as `algorithm` wants them, on weight's device, for `conv3x3(..., packed=...)`.

    "direct": [O, I, 3, 3] as it is. "winograd4": float32, 4 times as many elements, "winograd4_int16": int16, as many, and
    "winograd2": bfloat16, 16/9 times; all transformed in float64 and rounded once, so pack the most precise weights there
    are. "winograd4_lean" and "winograd6": float32, as many elements as before. "fp8": E4M3 [O, 9 I + 16], a byte a weight
    and two float32 scales in each row. Shape and content may change with any release: pack at load, store weights.
    transposed: the weights, [I, O, 3, 3] and turned by half a turn, of the convolution that carries dy back to dx.
    norm: for "fp8" alone: the norm in front, whose weight and bias say how large h is; by default weights of about 1.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating-point tensor [O, I, 3, 3], got {weight.dtype} {tuple(weight.shape)}")
    check_algorithm(algorithm)
    packed = torch.ops.fastdiff.conv3x3_pack(weight.detach(), algorithm, transposed)
    if algorithm == "fp8" and norm is not None and packed.device.type != "meta":
        _fp8.tails(packed)[:, 1] = _fp8.factor_of(norm.weight, norm.bias)
    return packed


def conv3x3_algorithms(dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The algorithms that serve `conv3x3` for x of this dtype on this device, here and now; "direct" is always one.

    Which of them is fastest depends on the layer: measure, and keep the choice.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return ("direct", "fp8") if dtype in _fp8.TYPES and _fp8.served(device) else ("direct",)
    if device.type != "cpu" or _register.serving("conv3x3", "cpu") != "c++" or dtype == torch.float64:
        return ("direct",)
    from fastdiff import _C

    served = ["direct", "winograd4", "winograd4_lean"]
    if dtype == torch.float32:
        served += [SIX] * _C.isa().startswith("avx512")
    elif dtype == torch.bfloat16:
        served += [INTEGERS] * (_C.isa() != "baseline") + ["winograd2"] * (_C.isa() == "avx512_bf16")
    return tuple(served)


def served(algorithm, x, weight, norm, packed):
    """`packed` for an algorithm that is served; made here where it is absent and needed."""
    check_algorithm(algorithm)
    if algorithm == "direct":
        if packed is not None and packed.shape != weight.shape:
            raise ValueError(f"packed: {tuple(packed.shape)} is not what conv3x3_pack(weight, 'direct') gives; pack again")
        return packed
    served = ALGORITHMS if torch.compiler.is_compiling() else conv3x3_algorithms(x.dtype, x.device)
    if algorithm not in served:
        raise ValueError(f"algorithm: {algorithm!r} is not served for {x.dtype} on {x.device}; use {' or '.join(served)}")
    if algorithm == "fp8" and norm is None:
        raise ValueError("norm: 'fp8' rounds what a norm gives, whose size is known without data; give norm=, or use direct")
    if packed is None:
        return conv3x3_pack(weight, algorithm, norm=norm)
    expected = packed_shape(weight, algorithm)
    if packed.dtype != OPERAND[algorithm] or tuple(packed.shape) != expected or not packed.is_contiguous():
        raise ValueError(
            f"packed: {packed.dtype} {tuple(packed.shape)} is not what conv3x3_pack(weight, {algorithm!r}) gives, "
            f"contiguous {OPERAND[algorithm]} {expected}; pack again"
        )
    return packed

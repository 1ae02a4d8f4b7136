"""philox_normal: standard normal noise as a pure function of (sample seed, draw, element).

Philox4x32-10 (Salmon et al. 2011) keyed with the sample's 64-bit seed and counted by (block low, block high, draw,
domain); four consecutive elements, numbered in logical C, H, W order, share a block, whose words 0,1 and 2,3 make one
Box-Muller pair each. `docs/noise.md` fixes every operation and its rounding: no back end may fuse a multiply with an
add, so that all of them agree bit for bit.
"""

import enum
import math
from collections.abc import Iterable, Sequence

import torch

from fastdiff.ops import _register


class Domain(enum.IntEnum):
    """Fourth counter word: keeps the streams of one seed apart."""

    INITIAL = 0  # x_T
    STEP = 1  # sampler steps
    TRAINING = 2  # add_noise
    AUGMENT = 3  # times, flips, dropout of labels
    DROPOUT = 4  # a network's units, while it learns on a CPU


MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Box-Muller in float32 (docs/noise.md). -2 ln(1+f) = f (-2 + f (1 + f P(f))) for 1+f in [sqrt(1/2), sqrt(2)); sine and
# cosine of a quarter turn times f in [-1/2, 1/2). Weighted minimax fits, errors 1.2e-8, 4.8e-9 and 7.6e-10.
SQRT_HALF_BITS = 0x3F3504F3
LN2_TIMES_2 = 1.3862943649291992
LOG_POLY = (
    0.15719091892242432,
    -0.25763243436813354,
    0.2625753581523895,
    -0.28362393379211426,
    0.33249107003211975,
    -0.4000457227230072,
    0.5000162124633789,
    -0.6666663289070129,
    1.0,
    -2.0,
)
SIN_POLY = (-0.004602177068591118, 0.07968022674322128, -0.6459634900093079, 1.5707963705062866)
COS_POLY = (0.0009067435166798532, -0.02086152881383896, 0.253669410943985, -1.2337005138397217, 1.0)


def philox_words(seeds: torch.Tensor, block: torch.Tensor, draw: int, domain: int) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words, as int64 [B, n], of Philox4x32-10 for seeds [B] (int64 bit patterns) and blocks [n]."""
    seeds = seeds.reshape(-1, 1)
    k0, k1 = seeds & MASK, (seeds >> 32) & MASK
    c0 = (block & MASK).expand(seeds.shape[0], -1)
    c1 = ((block >> 32) & MASK).expand_as(c0)
    c2 = torch.full_like(c0, draw)
    c3 = torch.full_like(c0, domain)
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64; masking after the shift recovers the unsigned high word.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        hi0, lo0, hi1, lo1 = (p0 >> 32) & MASK, p0 & MASK, (p1 >> 32) & MASK, p1 & MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _polynomial(coefficients: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def box_muller(w0: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 normals from two 32-bit words (int64 tensors): r cos(theta), r sin(theta); see docs/noise.md."""
    u = w0.to(torch.float32) * 2.0**-32 + 2.0**-33
    shifted = u.view(torch.int32) - SQRT_HALF_BITS
    exponent = (shifted >> 23).to(torch.float32)
    f = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    squared = exponent * -LN2_TIMES_2 + f * _polynomial(LOG_POLY, f)
    # torch.sqrt in float32 on CPUs is not correctly rounded; float64 then one rounding is.
    r = squared.double().sqrt().float()

    quarter = ((w1 << 2) & MASK).to(torch.int64)
    quarter = torch.where(quarter >= 2**31, quarter - 2**32, quarter)
    q = quarter.to(torch.float32) * 2.0**-32
    q2 = q * q
    sin, cos = q * _polynomial(SIN_POLY, q2), _polynomial(COS_POLY, q2)
    turn = w1 >> 30
    odd = (turn & 1).bool()
    c, s = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    c = torch.where((turn == 1) | (turn == 2), -c, c)
    s = torch.where(turn >= 2, -s, s)
    return r * c, r * s


def normal_float32(seeds: torch.Tensor, draw: int, domain: int, shape: Sequence[int]) -> torch.Tensor:
    """The reference: float32 noise [B, *shape]."""
    size = math.prod(shape)
    block = torch.arange((size + 3) // 4, device=seeds.device)
    w = philox_words(seeds, block, draw, domain)
    z = torch.stack((*box_muller(w[0], w[1]), *box_muller(w[2], w[3])), -1)
    return z.flatten(1)[:, :size].reshape(seeds.shape[0], *shape)


def reference(seeds, draw, domain, shape, dtype):
    return normal_float32(seeds, draw, domain, shape).to(dtype)


def _fake(seeds, draw, domain, shape, dtype):
    return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype)


_register.define(
    "philox_normal", "(Tensor seeds, int draw, int domain, SymInt[] shape, ScalarType dtype) -> Tensor", reference, _fake
)


def seed_tensor(seeds: Iterable[int] | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [B] tensor whose bit patterns are the seeds, each in 0 ... 2^64 - 1."""
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise TypeError(
                f"seeds: expected a one-dimensional int64 tensor of bit patterns, got {seeds.dtype} of shape "
                f"{tuple(seeds.shape)}; pass a list of Python integers in 0 ... 2**64 - 1"
            )
        return seeds.to(device)
    values = list(seeds)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"seeds: {value!r} is no integer; pass integers in 0 ... 2**64 - 1")
        if not 0 <= int(value) < 2**64:
            raise ValueError(f"seeds: {int(value)} is out of range; pass integers in 0 ... 2**64 - 1")
    signed = [int(v) - 2**64 if int(v) >= 2**63 else int(v) for v in values]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def philox_normal(
    seeds: torch.Tensor,  # int64 [B], bit patterns of the samples' 64-bit seeds
    draw: int,
    shape: Sequence[int],
    law: str = "normal",
    *,
    domain: int = Domain.INITIAL,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Noise [B, *shape], element e of sample b a function of (seeds[b], draw, domain, e) alone.

    Args:
        seeds: int64 [B]; the bit patterns of seeds in 0 ... 2^64 - 1 (`seed_tensor` makes it from integers).
        draw: 0 ... 2^32 - 1, which of the sample's independent draws.
        shape: of one sample; elements are numbered in this (logical, C-contiguous) order.
        law: "normal", the standard normal.
        domain: which stream, see `Domain`.
        dtype: of the result; values are made in float32 and rounded once.

    Returns: [B, *shape] on the device of seeds, contiguous.

    Raises: TypeError, ValueError for seeds, draw or law out of range.

    Bytes moved: the result, written once. References: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    if law != "normal":
        raise ValueError(f"law: {law!r} is not known; use 'normal'")
    if not 0 <= draw <= MASK:
        raise ValueError(f"draw: {draw} is out of range; use 0 ... 2**32 - 1")
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise TypeError(
            f"seeds: expected int64 [B], got {seeds.dtype} {tuple(seeds.shape)}; make it with fastdiff.ops.seed_tensor"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: {dtype} is not a floating-point type; use torch.float32, bfloat16, float16 or float64")
    return torch.ops.fastdiff.philox_normal(seeds, draw, int(domain), shape, dtype)

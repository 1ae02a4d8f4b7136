"""How consistency training refines its grid, as functions of progress k / K in [0, 1)."""

import math


def cm_levels(progress: float, s0: int, s1: int) -> int:
    """N = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 levels (Song et al. 2023, appendix C)."""
    return math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def cm_decay(levels: int, s0: int, mu0: float) -> float:
    """mu = exp(s0 ln mu0 / N): mu0 at the start, towards 1 as the grid grows."""
    return math.exp(s0 * math.log(mu0) / levels)


def ict_levels(progress: float, s0: int, s1: int) -> int:
    """N = min(s0 2^floor(k/K'), s1) + 1 levels, K' = K / (floor(log2(s1 / s0)) + 1) (Song and Dhariwal 2024)."""
    phases = math.floor(math.log2(s1 // s0)) + 1
    return min(s0 * 2 ** math.floor(progress * phases), s1) + 1

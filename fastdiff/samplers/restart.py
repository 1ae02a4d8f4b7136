"""Restart (Xu et al. 2023): Heun's ODE, with intervals in which noise is added and the ODE solved again, K times."""

import math
from collections.abc import Sequence
from itertools import pairwise

from typing_extensions import Unpack

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import GridOptions, check_nfe, grid
from fastdiff.samplers._recipe import Path, Vector, z
from fastdiff.samplers.ode import toward
from fastdiff.schedules import Schedule, karras

INTERVALS = ((0.06, 0.2, 2, 2),)  # the paper's for CIFAR-10 at 43 evaluations: 35 of Heun and 8 more


def restart(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    intervals: Sequence[tuple[float, float, int, int]] = INTERVALS,
    S_noise: float = 1.0,
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """Heun's steps to each interval's low end, then `repeats` times up to its high end by noise and back by Heun.

    intervals: (low, high, steps, repeats) in r = sigma / alpha; the level of the grid nearest to low, in log r, takes its
    place. nfe = 2 N - 1 + sum 2 steps repeats.
    """
    extra = sum(2 * steps * repeats for _, _, steps, repeats in intervals)
    check_nfe(nfe, "restart", fewest=extra + 1)
    odd = where.get("to_zero", True)
    if (nfe - extra) % 2 != odd:
        raise ValueError(f"nfe: restart with these intervals makes {extra} + 2 N{' - 1' * odd} evaluations, not {nfe}")
    path = Path("restart", grid(schedule, (nfe - extra + 1) // 2, **where), prediction, clip=clip)
    inner = [r for r in path.r[1:] if r > 0]
    at: dict[float, list[tuple[float, int, int]]] = {}
    for low, high, steps, repeats in intervals:
        if not 0 < low < high:
            raise ValueError(f"intervals: {low} ... {high}; need 0 < low < high")
        if not inner:
            raise ValueError(f"intervals: a grid of one step has no level to restart from; use nfe >= {extra + 3}")
        level = min(inner, key=lambda r: abs(math.log(r / low)))
        if not level < high:
            raise ValueError(
                f"intervals: the grid's level nearest to {low} is {level:.4g}, not below {high}; use a higher nfe"
            )
        at.setdefault(level, []).append((high, steps, repeats))
    y, draw = path.y, 0
    for _, now, then in path.steps():
        y = _heun(path, y, now, then)
        for high, steps, repeats in at.get(then, []):
            levels = [*karras(high, then, steps + 1).tolist()[:-1], then]
            for _ in range(repeats):
                y, draw = y + S_noise * math.sqrt(high**2 - then**2) * z(draw), draw + 1
                for a, b in pairwise(levels):
                    y = _heun(path, y, a, b)
    return path.plan(y)


def _heun(path: Path, y: Vector, now: float, then: float) -> Vector:
    y, d, eps = path.look(y, now)
    if then == 0:
        return toward(y, d, now, then)
    _, _, eps2 = path.look(toward(y, d, now, then), then)
    return y + (then - now) / 2 * (eps + eps2)

"""UniPC: a predictor, and a corrector that costs no evaluation of its own (Zhao et al. 2023)."""

import math

from typing_extensions import Unpack

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import GridOptions, check_nfe, grid
from fastdiff.samplers._recipe import Path, Vector, adams, combine
from fastdiff.samplers.dpm_solver import LOWER_AT_THE_END
from fastdiff.schedules import Schedule


def unipc(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    order: int = 2,
    estimate: str = "x0",
    B: str = "bh2",  # "bh1": B(h) = h, "bh2": B(h) = e^h - 1
    lower_order_final: bool | None = None,  # by default where nfe < 15
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """UniPC-p: D (or eps) as a polynomial in log r, integrated exactly.

    The predictor passes it through the last p estimates, the corrector through the new one as well, which raises the
    order to p + 1 (measured with the history given). Where the published method takes a shortcut, the predictor's second
    and the corrector's first order with weight 1/2, B(h) matters; in all other cases it cancels.
    """
    check_nfe(nfe, "unipc")
    if order not in (1, 2, 3):
        raise ValueError(f"order: {order} is not known; use 1, 2 or 3")
    if B not in ("bh1", "bh2"):
        raise ValueError(f"B: {B!r} is not known; use 'bh1' or 'bh2'")
    if estimate not in ("x0", "eps"):
        raise ValueError(f"estimate: {estimate!r} is not known; use 'x0' or 'eps'")
    low = nfe < LOWER_AT_THE_END if lower_order_final is None else lower_order_final
    path = Path("unipc", grid(schedule, nfe, **where), prediction, clip=clip, estimate=estimate)
    y, correct = path.y, None
    past: list[tuple[float, Vector]] = []  # latest first
    for i, now, then in path.steps():
        y, d, eps = path.look(y, now)
        e = d if estimate == "x0" else eps
        if correct is not None:
            y = y + correct(e)
        past = [(now, e), *past[: order - 1]]
        k = min(len(past), nfe - i) if low else len(past)
        y, correct = (d, None) if then == 0 else _predict(y, past[:k], then, estimate, B)
    return path.plan(y)


def _predict(y: Vector, past: list[tuple[float, Vector]], then: float, estimate: str, B: str):
    """y at level `then`, and the correction to it as a function of the estimate there."""
    p = len(past)
    levels, estimates = [r for r, _ in past], [v for _, v in past]
    now = levels[0]
    h = math.log(now / then)
    scale, hh = (1.0, -h) if estimate == "x0" else (then, h)
    half = -scale * (hh if B == "bh1" else math.expm1(hh)) / 2  # B(h) times the shortcut's 1/2
    if p == 2:
        ratio = math.log(levels[1] / now) / -h
        first = adams(levels[:1], now, then, estimate)
        weights = [float(first[0]) - half / ratio, half / ratio]
    else:
        weights = [float(w) for w in adams(levels, now, then, estimate)]

    def correct(new: Vector) -> Vector:
        if p == 1:
            return combine([half, -half], [new, estimates[0]])
        w = adams([then, *levels], now, then, estimate)
        return combine([w[0], *(w[1:] - weights)], [new, *estimates])

    return (1.0 if estimate == "eps" else then / now) * y + combine(weights, estimates), correct

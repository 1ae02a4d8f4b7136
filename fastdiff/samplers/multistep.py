"""Linear multistep solvers in eps: DEIS, LMS, iPNDM and PNDM."""

from collections.abc import Sequence

from typing_extensions import Unpack

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import GridOptions, check_nfe, grid
from fastdiff.samplers._recipe import Path, Vector, adams, combine
from fastdiff.samplers.dpm_solver import LOWER_AT_THE_END
from fastdiff.schedules import Schedule

# Adams-Bashforth on an even grid, latest first
BASHFORTH = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def deis(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    order: int = 3,
    lower_order_final: bool | None = None,  # by default where nfe < 15
    **where: Unpack[GridOptions],
) -> Plan:
    """tAB-DEIS of order 1 ... 4 with eps a polynomial in log r (Zhang and Chen 2022; diffusers' "logrho").

    The weights int L_j dr are exact. With eps a polynomial in log r this is DPM-Solver's "taylor" multistep.
    """
    return _adams("deis", schedule, prediction, nfe, order, "log", lower_order_final, where)


def lms(schedule: Schedule, prediction: Prediction, nfe: int, *, order: int = 4, **where: Unpack[GridOptions]) -> Plan:
    """Linear multistep of order 1 ... 4, eps a polynomial in r (Katherine Crowson's LMS; DEIS' rhoAB)."""
    return _adams("lms", schedule, prediction, nfe, order, "ratio", False, where)


def _adams(name, schedule, prediction, nfe, order, variable, lower_order_final, where) -> Plan:
    check_nfe(nfe, name)
    low = nfe < LOWER_AT_THE_END if lower_order_final is None else lower_order_final
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order: {order} is not known; use 1, 2, 3 or 4")
    path = Path(name, grid(schedule, nfe, **where), prediction, estimate="eps")
    y = path.y
    past: list[tuple[float, Vector]] = []  # latest first
    for i, now, then in path.steps():
        y, d, eps = path.look(y, now)
        past = [(now, eps), *past[: order - 1]]
        k = min(len(past), nfe - i) if low else len(past)
        if then == 0 and variable == "log":
            y = d
            continue
        levels = [r for r, _ in past[:k]]
        y = y + combine(adams(levels, now, then, "eps", variable), [e for _, e in past[:k]])
    return path.plan(y)


def ipndm(schedule: Schedule, prediction: Prediction, nfe: int, *, order: int = 4, **where: Unpack[GridOptions]) -> Plan:
    """iPNDM (Zhang and Chen 2022): Adams-Bashforth's weights of an even grid on eps, then y' = y + (r' - r) eps.

    It starts with orders 1, 2, 3. Of second order in the step, whatever `order` (Liu et al. 2022), since dr is not even.
    """
    check_nfe(nfe, "ipndm")
    if order not in BASHFORTH:
        raise ValueError(f"order: {order} is not known; use 1, 2, 3 or 4")
    path = Path("ipndm", grid(schedule, nfe, **where), prediction, estimate="eps")
    y = path.y
    past: list[Vector] = []  # latest first
    for _, now, then in path.steps():
        y, d, eps = path.look(y, now)
        past = [eps, *past[: order - 1]]
        y = d if then == 0 else _transfer(y, past, now, then)
    return path.plan(y)


def _transfer(y: Vector, past: Sequence[Vector], now: float, then: float) -> Vector:
    return y + (then - now) * combine(BASHFORTH[len(past)], past)


def pndm(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    warmup: str = "runge-kutta",  # "heun": one improved Euler step, then orders 2, 3, 4 (F-PNDM without "prk")
    **where: Unpack[GridOptions],
) -> Plan:
    """PNDM (Liu et al. 2022): pseudo Runge-Kutta for three steps, then pseudo Adams-Bashforth of 4 estimates.

    Every stage moves by DDIM's transfer y' = y + (r' - r) eps. Runge-Kutta's middle stages lie halfway in the schedule's
    time; three steps of 4 evaluations come first, so nfe = steps + 9, or steps + 1 with warmup "heun". Second order.
    """
    if warmup not in ("runge-kutta", "heun"):
        raise ValueError(f"warmup: {warmup!r} is not known; use 'runge-kutta' or 'heun'")
    more, first = (9, 3) if warmup == "runge-kutta" else (1, 1)
    to_zero = where.get("to_zero", True)
    check_nfe(nfe, "pndm", fewest=more + first + to_zero)
    path = Path("pndm", grid(schedule, nfe - more, **where), prediction, estimate="eps")
    y = path.y
    past: list[Vector] = []  # latest first
    for i, now, then in path.steps():
        y, d, eps = path.look(y, now)
        past = [eps, *past[:3]]
        if then == 0:
            y = d
        elif i >= first:
            y = _transfer(y, past, now, then)
        elif warmup == "heun":
            _, _, eps2 = path.look(y + (then - now) * eps, then)
            y = y + (then - now) / 2 * (eps + eps2)
        else:
            y = _runge_kutta(path, y, eps, now, then)
    return path.plan(y)


def _runge_kutta(path: Path, y: Vector, eps: Vector, now: float, then: float) -> Vector:
    t = (path.at(now)[0] + path.at(then)[0]) / 2
    middle = float(path.grid.schedule.ratio(t))
    _, _, eps2 = path.look(y + (middle - now) * eps, middle)
    _, _, eps3 = path.look(y + (middle - now) * eps2, middle)
    end, _, eps4 = path.look(y + (then - now) * eps3, then)
    eps3 = (end - y) / (then - now)  # it made `end`, so that it needs no register of its own
    return y + (then - now) / 6 * (eps + 2 * eps2 + 2 * eps3 + eps4)

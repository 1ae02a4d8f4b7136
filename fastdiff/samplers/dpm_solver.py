"""DPM-Solver and DPM-Solver++, single-step and multistep, deterministic and stochastic (Lu et al. 2022a, 2022b).

Exponential integrators in lambda = log(alpha / sigma): DPM-Solver integrates eps exactly between levels, DPM-Solver++
integrates D, as polynomials in lambda. With h = lambda' - lambda and r = sigma / alpha = exp(-lambda), in y = x / alpha:

    DPM-Solver:    y' = y - r' sum_k phi_k(h) eps^(k)      DPM-Solver++:  y' = (r' / r) y + sum_k phi_k(h) D^(k)
"""

import math

import numpy as np
from typing_extensions import Unpack

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import GridOptions, check_nfe, grid
from fastdiff.samplers._recipe import Path, Vector, adams, combine, z
from fastdiff.samplers.ode import toward
from fastdiff.schedules import Schedule

LOWER_AT_THE_END = 15  # below this many evaluations the last steps are of lower order, as in the published code


def dpm_solver_multi(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    order: int = 2,
    estimate: str = "x0",  # "x0": DPM-Solver++, "eps": DPM-Solver
    eta: float = 0.0,  # 0: the ODE; 1: SDE-DPM-Solver++
    S_noise: float = 1.0,
    solver: str | None = None,
    lower_order_final: bool | None = None,  # by default where nfe < 15
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver(++) 1M, 2M, 3M: the polynomial through the last `order` estimates, one evaluation a step.

    solver: "taylor", the polynomial integrated exactly; "dpmsolver", the published code's default ("midpoint" in diffusers),
    which weighs the second order's difference by phi_1 / 2, and in the third order takes half of the second difference, so
    that its order of convergence is 2; "k-diffusion" is "taylor" in the second order and halves it in the third too. By
    default "dpmsolver" for orders 1 and 2, "taylor" for 3. It starts with orders 1, 2, ...; a step to r = 0 is the
    estimate itself.
    """
    name = f"{'sde-' if eta else ''}{_family(estimate)}{order}m"
    check_nfe(nfe, name)
    solver = ("taylor" if order == 3 else "dpmsolver") if solver is None else solver
    _check(order, estimate, solver, eta)
    low = nfe < LOWER_AT_THE_END if lower_order_final is None else lower_order_final
    path = Path(name, grid(schedule, nfe, **where), prediction, clip=clip, estimate=estimate)
    y = path.y
    past: list[tuple[float, Vector]] = []  # latest first
    for i, now, then in path.steps():
        y, d, eps = path.look(y, now)
        past = [(now, d if estimate == "x0" else eps), *past[: order - 1]]
        k = min(len(past), nfe - i) if low else len(past)
        if then == 0:
            y = d
            continue
        y = multistep_update(y, past[:k], then, estimate, solver, eta)
        if eta:
            y = y + S_noise * then * math.sqrt(-math.expm1(-2 * eta * math.log(now / then))) * z(i)
    return path.plan(y)


def _family(estimate: str) -> str:
    return "dpm-solver++" if estimate == "x0" else "dpm-solver-"


def _check(order: int, estimate: str, solver: str, eta: float) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"order: {order} is not known; use 1, 2 or 3")
    if estimate not in ("x0", "eps"):
        raise ValueError(f"estimate: {estimate!r} is not known; use 'x0' (DPM-Solver++) or 'eps' (DPM-Solver)")
    if solver not in ("taylor", "dpmsolver", "k-diffusion"):
        raise ValueError(f"solver: {solver!r} is not known; use 'taylor', 'dpmsolver' or 'k-diffusion'")
    if not eta >= 0:
        raise ValueError(f"eta: {eta} is negative; use 0 (the ODE) or more, 1 for the reverse SDE")
    if eta and estimate != "x0":
        raise ValueError("eta: noise is added to DPM-Solver++ only; use estimate='x0' or eta=0")


def multistep_update(
    y: Vector, past: list[tuple[float, Vector]], then: float, estimate: str, solver: str, eta: float = 0.0
) -> Vector:
    """y at level `then` from the estimates `past` at [(level, estimate), ...], latest first; without its noise."""
    levels, estimates = [r for r, _ in past], [v for _, v in past]
    now, gain = levels[0], 1.0 + eta
    if solver == "taylor" or len(past) == 1 or (solver == "k-diffusion" and len(past) == 2):
        weights = adams(levels, now, then, estimate, gain=gain)
    else:
        weights = _published(levels, then, estimate, gain)
    return (1.0 if estimate == "eps" else (then / now) ** gain) * y + combine(weights, estimates)


def _published(levels: list[float], then: float, estimate: str, gain: float) -> np.ndarray:
    """Weights of the estimates in the published code's second and third order."""
    now = levels[0]
    h = gain * math.log(now / then)
    if estimate == "x0":
        sign, scale, phi = 1.0, 1.0, -math.expm1(-h)
        phi2 = 1 - phi / h
        phi3 = 0.5 - phi2 / h
    else:
        sign, scale, phi = -1.0, then, math.expm1(h)
        phi2 = phi / h - 1
        phi3 = phi2 / h - 0.5
    unit = math.log(now / then)  # differences are per step, without the gain
    r0 = math.log(levels[1] / now) / unit
    first = np.array([1.0, -1.0]) / r0  # (e_0 - e_1) / r0
    if len(levels) == 2:
        return sign * scale * phi * (np.array([1.0, 0.0]) + 0.5 * first)
    r1 = math.log(levels[2] / levels[1]) / unit
    d0, d1 = np.append(first, 0.0), np.array([0.0, 1.0, -1.0]) / r1
    return (
        sign
        * scale
        * (phi * np.array([1.0, 0, 0]) + phi2 * (d0 + r0 / (r0 + r1) * (d0 - d1)) + phi3 * (d0 - d1) / (r0 + r1))
    )


def dpm_solver_single(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    order: int = 3,
    estimate: str = "eps",
    solver: str = "dpmsolver",
    inner: str = "logsnr",
    lower_order_final: bool = True,
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver(++) 1S, 2S, 3S: `order` evaluations a step, the last steps of lower order so that they add up to nfe.

    Third order: steps of 3 evaluations, ending 2, 1 or 1 or 2; second: of 2, ending with 1 where nfe is odd (DPM-Solver's
    "fast" lists). The step to r = 0 is one evaluation. Without lower_order_final all other steps are of full order.

    inner: levels within a step even in log r ("logsnr"), in the schedule's time ("time"), or the grid's own, which then has
    a level for every evaluation ("grid", as diffusers has it; its third stage is that of solver="taylor").
    """
    name = f"{_family(estimate)}{order}s"
    check_nfe(nfe, name)
    _check(order, estimate, solver, 0.0)
    orders = order_list(nfe, order, where.get("to_zero", True), lower_order_final)
    if inner not in ("logsnr", "time", "grid"):
        raise ValueError(f"inner: {inner!r} is not known; use 'logsnr', 'time' or 'grid'")
    own = inner == "grid"
    path = Path(name, grid(schedule, nfe if own else len(orders), **where), prediction, clip=clip, estimate=estimate)
    y, last = path.y, 0
    for k in orders:
        first, last = last, last + (k if own else 1)
        now, then = path.r[first], path.r[last]
        y, d, eps = path.look(y, now)
        if then == 0 or k == 1:
            y = toward(y, d, now, then)
        else:
            levels = path.r[first + 1 : last] if own else _inner_levels(path, now, then, k, inner)
            y = single_step_update(path, y, d if estimate == "x0" else eps, now, levels, then, estimate, solver)
    return path.plan(y)


def order_list(nfe: int, order: int, to_zero: bool, lower: bool = True) -> list[int]:
    """Orders of the single steps that make nfe evaluations; a step to zero is of order 1."""
    if order == 1:
        return [1] * nfe
    rest = nfe - 1 if to_zero else nfe
    if not lower:
        if rest % order:
            raise ValueError(f"nfe: steps of order {order} alone make {order} N{' + 1' * to_zero} evaluations, not {nfe}")
        return [order] * (rest // order) + [1] * to_zero
    last = {2: {0: [], 1: [1]}, 3: {0: [], 1: [1], 2: [2]}}[order][rest % order]
    orders = [order] * (rest // order) + last
    if order == 3 and rest % 3 == 0 and rest and not to_zero:
        orders = [3] * (rest // 3 - 1) + [2, 1]
    return [*orders, 1] if to_zero else orders


def _inner_levels(path: Path, now: float, then: float, order: int, inner: str) -> list[float]:
    parts = [j / order for j in range(1, order)]
    if inner == "logsnr":
        return [math.exp((1 - p) * math.log(now) + p * math.log(then)) for p in parts]
    t0, t1 = path.at(now)[0], path.at(then)[0]
    return [float(path.grid.schedule.ratio(t0 + p * (t1 - t0))) for p in parts]


def single_step_update(
    path: Path, y: Vector, e: Vector, now: float, levels: list[float], then: float, estimate: str, solver: str
) -> Vector:
    """Two or three stages from `now` over `levels` to `then`; e is the estimate at y."""
    h = math.log(now / then)

    def first(r: float, *differences: tuple[float, Vector]) -> Vector:
        """First order to level r, plus weighted differences of estimates."""
        total = toward(y, e, now, r) if estimate == "x0" else y + (r - now) * e
        return total + combine([w for w, _ in differences], [v for _, v in differences])

    def phi(r: float) -> tuple[float, float, float]:
        """Factors of e's first three derivatives in h at level r."""
        g = math.log(now / r)
        if estimate == "x0":
            p1 = -math.expm1(-g)
            p2 = 1 - p1 / g
            return p1, p2, 0.5 - p2 / g
        p1 = math.expm1(g)
        p2 = p1 / g - 1
        return -r * p1, -r * p2, -r * (p2 / g - 0.5)

    def look(at: Vector, r: float) -> Vector:
        _, d, eps = path.look(at, r)
        return d if estimate == "x0" else eps

    r1 = math.log(now / levels[0]) / h
    e1 = look(first(levels[0]), levels[0])
    p1, p2, p3 = phi(then)
    if len(levels) == 1:
        return first(then, ((0.5 * p1 if solver == "dpmsolver" else p2) / r1, e1 - e))
    r2 = math.log(now / levels[1]) / h
    e2 = look(first(levels[1], (r2 / r1 * phi(levels[1])[1], e1 - e)), levels[1])
    if solver == "dpmsolver":
        return first(then, (p2 / r2, e2 - e))
    d1, d2 = (e1 - e) / r1, (e2 - e) / r2
    return first(then, (p2 / (r2 - r1), r2 * d1 - r1 * d2), (2 * p3 / (r2 - r1), d2 - d1))

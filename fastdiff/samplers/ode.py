"""Runge-Kutta steps on the probability-flow ODE: Euler, Heun, midpoint, DPM2; with churn (Karras et al. 2022, algorithm 2).

Written for y = x / alpha at noise level r = sigma / alpha, where every schedule's ODE is dy/dr = eps = (y - D) / r.
"""

import dataclasses
import math
from collections.abc import Callable

from typing_extensions import Unpack

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import Grid, GridOptions, check_nfe, grid
from fastdiff.samplers._recipe import Path, Recipe, Vector, z
from fastdiff.schedules import Schedule

# (path, y, D, eps, level, next level) -> y at the next level
Step = Callable[[Path, Vector, Vector, Vector, float, float], Vector]


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise added before each step: r_hat = r (1 + gamma), gamma = min(S_churn / N, sqrt(2) - 1) for S_min <= r <= S_max."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def gamma(self, r: float, steps: int) -> float:
        return min(self.S_churn / steps, math.sqrt(2) - 1) if self.S_min <= r <= self.S_max else 0.0

    def apply(self, y: Vector, r: float, step: int, steps: int) -> tuple[Vector, float]:
        """y with the noise of this step, and r_hat."""
        hat = r * (1 + self.gamma(r, steps))
        extra = self.S_noise * math.sqrt(max(hat**2 - r**2, 0.0))
        return (y + extra * z(step), hat) if extra > 0 else (y, hat)


def toward(y: Vector, d: Vector, now: float, then: float) -> Vector:
    """Euler's step y + (then - now) eps, in the form that leaves nothing of y at then = 0; DDIM, DPM-Solver-1."""
    return then / now * y + (1 - then / now) * d


def euler(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    variable: str = "ratio",  # what Euler's step is linear in: "ratio", "time" (of an SDE), "variance" (r^2)
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """First order: y' = y + (r' - r_hat) eps, one evaluation a step."""
    check_nfe(nfe, "euler")
    levels, churn = grid(schedule, nfe, **where), Churn(S_churn, S_min, S_max, S_noise)
    if variable != "ratio":
        return _in_other_variable("euler", levels, prediction, variable, churn, clip)
    return _run("euler", levels, prediction, churn, clip, lambda path, y, d, eps, now, then: toward(y, d, now, then))


def heun(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    variable: str = "ratio",
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """Second order, EDM's sampler: an Euler step corrected by the trapezoid rule, except the last: nfe = 2 N - 1."""
    levels = grid(schedule, two_stage_steps(nfe, "heun", where), **where)
    churn = Churn(S_churn, S_min, S_max, S_noise)
    if variable != "ratio":
        return _in_other_variable("heun", levels, prediction, variable, churn, clip)

    def step(path, y, d, eps, now, then):
        if then == 0:
            return toward(y, d, now, then)
        _, _, eps2 = path.look(toward(y, d, now, then), then)
        return y + (then - now) / 2 * (eps + eps2)

    return _run("heun", levels, prediction, churn, clip, step)


def midpoint(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    mean: str = "arithmetic",
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """Second order: an Euler step to a level between, whose eps makes the whole step; Euler to r = 0: nfe = 2 N - 1.

    mean: that level: "arithmetic", "geometric" (DPM2 of k-diffusion, DPM-Solver-2), or "cubic", ((r^(1/3) + r'^(1/3)) / 2)^3
    (the consistency models' code), which needs no exception at 0 and makes 2 N evaluations.
    """
    if mean not in MEANS:
        raise ValueError(f"mean: {mean!r} is not known; use one of {', '.join(MEANS)}")
    name = "dpm2" if mean == "geometric" else "midpoint"
    levels = grid(schedule, two_stage_steps(nfe, name, where, at_zero=mean == "cubic"), **where)

    def step(path, y, d, eps, now, then):
        if then == 0 and mean != "cubic":
            return toward(y, d, now, then)
        middle = MEANS[mean](now, then)
        _, _, eps2 = path.look(toward(y, d, now, middle), middle)
        return y + (then - now) * eps2

    return _run(name, levels, prediction, Churn(S_churn, S_min, S_max, S_noise), clip, step)


MEANS: dict[str, Callable[[float, float], float]] = {
    "arithmetic": lambda a, b: (a + b) / 2,
    "geometric": lambda a, b: math.sqrt(a * b),
    "cubic": lambda a, b: ((a ** (1 / 3) + b ** (1 / 3)) / 2) ** 3,
}


def two_stage_steps(nfe: int, name: str, where: GridOptions, *, at_zero: bool = False) -> int:
    """N where a step makes two evaluations, but only one where it goes to 0."""
    check_nfe(nfe, name)
    odd = where.get("to_zero", True) and not at_zero
    if nfe % 2 != odd:
        count = "2 N - 1" if odd else "2 N"
        raise ValueError(
            f"nfe: {name} makes {count} evaluations in N steps, not {nfe}; the nearest are {nfe - 1} and {nfe + 1}"
        )
    return (nfe + 1) // 2


def _run(name: str, levels: Grid, prediction: Prediction, churn: Churn, clip: bool, step: Step) -> Plan:
    path = Path(name, levels, prediction, clip=clip)
    y = path.y
    for i, level, then in path.steps():
        y, now = churn.apply(y, level, i, levels.steps)
        y, d, eps = path.look(y, now)
        y = step(path, y, d, eps, now, then)
    return path.plan(y)


def _in_other_variable(name: str, levels: Grid, prediction: Prediction, variable: str, churn: Churn, clip: bool) -> Plan:
    """Euler and Heun where the steps are linear in another variable than r (EDM's ablations of published samplers).

    "variance": y in u = r^2, dy/du = eps / (2 r). "time": x in the SDE's own time t, dx/dt = f x + g^2 eps / (2 sigma).
    The last step goes to u = 0 by the same rule, which is not D.
    """
    schedule = levels.schedule
    if variable not in ("time", "variance"):
        raise ValueError(f"variable: {variable!r} is not known; use ratio, time or variance")
    if churn.S_churn:
        raise ValueError(f"S_churn: {churn.S_churn} with variable={variable!r} is not defined here; use variable='ratio'")
    in_time = variable == "time"
    recipe = Recipe(name, schedule, prediction, float(levels.t[0]), clip=clip)
    t = levels.t.tolist()

    def slope(x: Vector, d: Vector, at: float) -> Vector:
        """dx/du for "time", d(x / alpha)/du for "variance"."""
        alpha, sigma = float(schedule.alpha(at)), float(schedule.sigma(at))
        eps = (x - alpha * d) / sigma
        if not in_time:
            return eps * (alpha / (2 * sigma))
        f, g2 = schedule.drift_diffusion(at)
        return float(f) * x + float(g2) / (2 * sigma) * eps

    x, last = recipe.x, len(t) - 2
    for i in range(levels.steps):
        ends = i == last and levels.r[-1] == 0
        u = (t[i], 0.0 if ends else t[i + 1]) if in_time else (float(levels.r[i]) ** 2, float(levels.r[i + 1]) ** 2)
        # "time" steps x itself, "variance" y = x / alpha
        a0, a1 = (1.0, 1.0) if in_time else (float(schedule.alpha(t[i])), 1.0 if ends else float(schedule.alpha(t[i + 1])))
        x, d = recipe.look(x, t[i])
        first = slope(x, d, t[i])
        end = a1 * (x / a0 + (u[1] - u[0]) * first)
        if name == "heun" and not ends:
            x2, d2 = recipe.look(end, t[i + 1])
            end = a1 * (x / a0 + (u[1] - u[0]) / 2 * (first + slope(x2, d2, t[i + 1])))
        x = end
    return recipe.plan(x, t[-1])

"""Times of the evaluations, and the checks that every sampler makes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from typing_extensions import TypedDict

from fastdiff.schedules import DDPM, EDM, Schedule, karras, log_linear


class GridOptions(TypedDict, total=False):
    """Where a sampler of the ODE and SDE families steps; see `grid`."""

    times: Sequence[float] | None
    spacing: str
    rho: float
    ratio_min: float | None
    ratio_max: float | None
    t_start: float | None
    to_zero: bool


@dataclasses.dataclass(frozen=True)
class Grid:
    """Levels r = sigma / alpha of the steps, from the most noise to the least, and their times."""

    schedule: Schedule
    t: np.ndarray  # [steps + 1]
    r: np.ndarray  # [steps + 1]; the last is 0 where the plan ends with the image itself

    @property
    def steps(self) -> int:
        return len(self.r) - 1


def grid(
    schedule: Schedule,
    steps: int,
    *,
    times: Sequence[float] | None = None,
    spacing: str = "karras",
    rho: float = 7.0,
    ratio_min: float | None = None,
    ratio_max: float | None = None,
    t_start: float | None = None,
    to_zero: bool = True,
) -> Grid:
    """The levels of `steps` steps.

    Args:
        times: given ones, in the schedule's own time, strictly descending: `steps` of them, or steps + 1 without to_zero.
        spacing: of all levels but the 0 at the end: "karras" (even in r^(1/rho)), "logsnr" (even in log r), or a law in
            time (see `times_of`): "uniform", "linspace", "quadratic", "trailing".
        rho: of "karras".
        ratio_min, ratio_max: smallest and largest r for "karras" and "logsnr"; the schedule's own by default.
        t_start: the first level's time, in place of the schedule's t_max.
        to_zero: the last step goes to r = 0, the image; otherwise the plan ends at the last level, with its noise.
    """
    n = steps if to_zero else steps + 1
    if t_start is not None:
        ratio_max = float(schedule.ratio(schedule.check(t_start, "t_start")))
    if times is not None:
        t = given_times(schedule, times, n)
    elif spacing == "karras":
        t = schedule.time_of(ratio_grid(schedule, n, rho, ratio_min, ratio_max))
    elif spacing == "logsnr":
        ends = ratio_grid(schedule, 2, 1.0, ratio_min, ratio_max)
        t = schedule.time_of(log_linear(ends, n))
    else:
        t = times_of(schedule, n, spacing, t_start)
    with np.errstate(divide="ignore"):
        r = schedule.ratio(t)
    if not np.all(np.isfinite(r)):
        raise ValueError(
            f"times: alpha is 0 at t = {t[0]}, where this sampler's steps are not defined; use ddim, or start at a smaller t"
        )
    if not to_zero:
        return Grid(schedule, t, r)
    return Grid(schedule, np.append(t, schedule.t_min), np.append(r, 0.0))


def check_nfe(nfe: int, name: str, most: int | None = None, fewest: int = 1) -> None:
    """ValueError unless nfe is an integer in fewest ... most."""
    if isinstance(nfe, bool) or not hasattr(nfe, "__index__"):
        raise TypeError(f"nfe: {nfe!r} is no integer; give the number of network evaluations")
    if nfe < fewest:
        images = f"{nfe} evaluations make no image" if nfe < 1 else f"{nfe} is not enough"
        raise ValueError(f"nfe: {images}; the fewest that {name} can do is {fewest}")
    if most is not None and nfe > most:
        raise ValueError(f"nfe: {name} can do at most {most} evaluations on this schedule, not {nfe}; use {most}")


def times_of(schedule: Schedule, nfe: int, spacing: str, t_start: float | None = None) -> np.ndarray:
    """nfe descending times of the schedule, from t_start where it is given (on discrete schedules, rounded down).

    On discrete schedules "uniform" is i (T // nfe), "quadratic" the squares of linspace(0, sqrt(0.8 T)) (DDIM),
    "trailing" counts back from T - 1; "linspace" includes both ends. Where time is the noise level itself (EDM, VE) it is
    EDM's grid. On the other continuous ones "quadratic" is even in sqrt(t), the others even steps from t_max to t_min,
    both in.
    """
    if spacing not in ("uniform", "linspace", "quadratic", "trailing"):
        raise ValueError(f"spacing: {spacing!r} is not known; use uniform, linspace, quadratic or trailing")
    top = schedule.t_max if t_start is None else float(schedule.check(t_start, "t_start"))
    if isinstance(schedule, DDPM):
        T = int(top) + 1
        grids = {
            "uniform": lambda: np.arange(nfe) * (T // nfe),
            "linspace": lambda: np.round(np.linspace(0, T - 1, nfe)) if nfe > 1 else np.array([T - 1]),
            "trailing": lambda: np.round(T - np.arange(nfe) * (T / nfe)) - 1,
            "quadratic": lambda: np.floor(np.linspace(0, np.sqrt(0.8 * T), nfe) ** 2),
        }
        t = np.unique(grids[spacing]().astype(int))
        if len(t) < nfe:
            raise ValueError(f"nfe: {spacing} spacing of {T} steps has {len(t)} distinct times, not {nfe}; use less")
        return t[::-1].astype(np.float64)
    if isinstance(schedule, EDM):
        return karras(top, schedule.t_min, nfe)
    power = 2 if spacing == "quadratic" else 1
    return np.linspace(top ** (1 / power), schedule.t_min ** (1 / power), nfe) ** power


def ratio_grid(schedule: Schedule, steps: int, rho: float, ratio_min: float | None, ratio_max: float | None) -> np.ndarray:
    """EDM's grid of sigma / alpha from the schedule's largest to its smallest, `steps` levels."""
    low = float(schedule.ratio(schedule.t_min)) if ratio_min is None else ratio_min
    high = float(schedule.ratio(schedule.t_max)) if ratio_max is None else ratio_max
    if not np.isfinite(high) or not 0 < low < high:
        raise ValueError(
            f"ratio_min, ratio_max: sigma / alpha cannot go from {high} to {low}; give 0 < ratio_min < ratio_max, such as "
            f"ratio_max=80 on a schedule that starts from pure noise"
        )
    return karras(high, low, steps, rho)


def given_times(schedule: Schedule, times, nfe: int) -> np.ndarray:
    """An explicit grid: nfe strictly descending times in the schedule's range."""
    t = schedule.check(np.atleast_1d(times))
    if t.shape != (nfe,):
        raise ValueError(f"times: {len(t)} given for nfe = {nfe}; give exactly {nfe}")
    if np.any(np.diff(t) >= 0):
        raise ValueError(f"times: {list(map(float, t))} do not strictly descend; sort them from most to least noise")
    return t


def respaced(schedule: Schedule, sections: Sequence[int]) -> np.ndarray:
    """Descending steps of a DDPM chain cut into equal parts, of which each keeps so many even ones, both ends in."""
    if not isinstance(schedule, DDPM):
        raise ValueError(f"sections: {type(schedule).__name__} has no discrete steps; use times= or spacing=")
    size, extra = divmod(schedule.T, len(sections))
    kept: list[int] = []
    first = 0
    for i, count in enumerate(sections):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(f"sections: {count} steps cannot be kept of {length}; give 1 ... {length}")
        stride = (length - 1) / max(count - 1, 1)
        kept += [first + round(j * stride) for j in range(count)]
        first += length
    return np.array(kept[::-1], dtype=np.float64)

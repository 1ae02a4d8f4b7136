"""Times of the evaluations, and the checks that every sampler makes."""

import numpy as np

from fastdiff.schedules import DDPM, EDM, Schedule, karras


def check_nfe(nfe: int, name: str, most: int | None = None) -> None:
    """ValueError unless nfe is an integer in 1 ... most."""
    if isinstance(nfe, bool) or not hasattr(nfe, "__index__"):
        raise TypeError(f"nfe: {nfe!r} is no integer; give the number of network evaluations")
    if nfe < 1:
        raise ValueError(f"nfe: {nfe} evaluations make no image; the fewest that {name} can do is 1")
    if most is not None and nfe > most:
        raise ValueError(f"nfe: {name} can do at most {most} evaluations on this schedule, not {nfe}; use {most}")


def times_of(schedule: Schedule, nfe: int, spacing: str) -> np.ndarray:
    """nfe descending times of the schedule.

    On discrete schedules "uniform" is i (T // nfe) and "quadratic" the squares of linspace(0, sqrt(0.8 T)) (DDIM);
    "linspace" includes both ends. Where time is the noise level itself (EDM, VE) it is EDM's grid. On the other
    continuous ones "uniform" and "linspace" are even steps from t_max to t_min, both in; "quadratic" is even in sqrt(t).
    """
    if spacing not in ("uniform", "linspace", "quadratic"):
        raise ValueError(f"spacing: {spacing!r} is not known; use uniform, linspace or quadratic")
    if isinstance(schedule, DDPM):
        grids = {
            "uniform": lambda: np.arange(nfe) * (schedule.T // nfe),
            "linspace": lambda: np.round(np.linspace(0, schedule.T - 1, nfe)) if nfe > 1 else np.array([schedule.T - 1]),
            "quadratic": lambda: np.floor(np.linspace(0, np.sqrt(0.8 * schedule.T), nfe) ** 2),
        }
        t = np.unique(grids[spacing]().astype(int))
        if len(t) < nfe:
            raise ValueError(
                f"nfe: {spacing} spacing of {schedule.T} steps has {len(t)} distinct times, not {nfe}; use less"
            )
        return t[::-1].astype(np.float64)
    if isinstance(schedule, EDM):
        return karras(schedule.t_max, schedule.t_min, nfe)
    power = 2 if spacing == "quadratic" else 1
    return np.linspace(schedule.t_max ** (1 / power), schedule.t_min ** (1 / power), nfe) ** power


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

"""Good times for a few-step model, found by trying."""

from collections.abc import Callable

import numpy as np

from fastdiff.samplers._grids import check_nfe
from fastdiff.schedules import Schedule, karras


def search_times(
    score: Callable[[list[float]], float], schedule: Schedule, nfe: int, *, levels: int = 24, rounds: int = 3
) -> list[float]:
    """The times of nfe evaluations with the lowest score(times), the first of them t_max.

    Coordinate descent: in each round every other time in turn moves to the best of `levels` of EDM's grid that lie between
    its neighbours, until a round changes nothing. About rounds * levels calls; score should use the same seeds each time.
    A model keeps what is found: model.times[nfe] = search_times(...); model.save(...).
    """
    check_nfe(nfe, "search_times")
    if levels < nfe:
        raise ValueError(f"levels: {levels} are too few to choose {nfe} times from; use {nfe} or more")
    candidates = schedule.time_of(
        karras(float(schedule.ratio(schedule.t_max)), float(schedule.ratio(schedule.t_min)), levels)
    )
    candidates[0] = schedule.t_max
    chosen = np.round(np.linspace(0, levels - 1, nfe + 1)).astype(int)[:nfe].tolist()

    def scored(indices: list[int]) -> float:
        return float(score([float(candidates[i]) for i in indices]))

    best = scored(chosen)
    for _ in range(rounds):
        before = list(chosen)
        for k in range(1, nfe):
            after = chosen[k + 1] if k + 1 < nfe else levels
            for i in range(chosen[k - 1] + 1, after):
                if i == before[k]:
                    continue
                trial = [*chosen[:k], i, *chosen[k + 1 :]]
                if (value := scored(trial)) < best:
                    best, chosen = value, trial
        if chosen == before:
            break
    return [float(candidates[i]) for i in chosen]

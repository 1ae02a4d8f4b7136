"""Pairwise covering: few cases in which every two values of different parameters still meet."""

import itertools
from collections.abc import Callable
from typing import Any


def pairwise(parameters: dict[str, list], valid: Callable[[dict], bool] = lambda case: True) -> list[dict[str, Any]]:
    """Cases, one value for each parameter, in which every pair of values that any valid case holds occurs.

    Greedy and deterministic: each case starts from the first pair not yet covered and takes, parameter by parameter, the
    value that covers most of the others. `valid` sees complete cases only; a pair that no valid case holds is left out.
    The number of cases is about the product of the two longest lists.
    """
    names = list(parameters)
    missing = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(parameters[a]))
        for j in range(len(parameters[b]))
    }
    cases = []
    while missing:
        pair = next(iter(missing))
        chosen = _complete(dict(pair), names, parameters, missing, valid)
        if chosen is None:  # no valid case holds this pair
            del missing[pair]
            continue
        for met in _pairs(chosen, names):
            missing.pop(met, None)
        cases.append(_values(chosen, parameters))
    return cases


def _values(chosen, parameters):
    return {name: parameters[name][chosen[name]] for name in parameters}


def _pairs(chosen, names):
    return itertools.combinations([(name, chosen[name]) for name in names if name in chosen], 2)


def _complete(chosen, names, parameters, missing, valid):
    """`chosen` (name -> index) with the other names filled in so that the case is valid; None if that is impossible."""
    rest = [name for name in names if name not in chosen]
    if not rest:
        return chosen if valid(_values(chosen, parameters)) else None

    def gain(i):
        return sum(pair in missing for pair in _pairs({**chosen, rest[0]: i}, names))

    for i in sorted(range(len(parameters[rest[0]])), key=gain, reverse=True):
        if (done := _complete({**chosen, rest[0]: i}, names, parameters, missing, valid)) is not None:
            return done
    return None

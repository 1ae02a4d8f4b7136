"""The covering array covers: every pair that any valid case holds, in few cases, the same ones every time."""

import itertools

import covering
import pytest

NORM = {
    "channels": [1, 3, 32, 64, 96, 128, 192, 256, 320, 384, 512, 576, 768, 1024, 1152],
    "groups": [1, 4, 8, 16, 32, "C"],
    "size": [(1, 1), (7, 5), (8, 8), (16, 16), (64, 64)],
    "batch": [0, 1, 3],
    "layout": ["contiguous", "channels_last", "view"],
    "dtype": ["float32", "bfloat16", "float16"],
}


def divides(case):
    return case["groups"] == "C" or case["channels"] % case["groups"] == 0


def pairs(cases):
    return {frozenset(pair) for case in cases for pair in itertools.combinations(case.items(), 2)}


@pytest.mark.parametrize(
    "parameters, valid",
    [
        ({"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2, 3]}, lambda case: True),
        ({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}, lambda case: len(set(case.values())) > 1),
        ({"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1]}, lambda case: case["a"] <= case["b"]),
        ({"a": [0, 1], "b": [0, 1]}, lambda case: False),
        (NORM, divides),
    ],
)
def test_every_valid_pair_is_covered(parameters, valid):
    full = [dict(zip(parameters, values, strict=True)) for values in itertools.product(*parameters.values())]
    possible = [case for case in full if valid(case)]
    cases = covering.pairwise(parameters, valid)
    assert all(case in possible for case in cases)
    assert pairs(cases) == pairs(possible)


def test_few_cases_and_always_the_same():
    cases = covering.pairwise(NORM, divides)
    assert 15 * 4 <= len(cases) <= 100, "the product of the two longest lists, of 12,150 cases"
    assert cases == covering.pairwise(NORM, divides)


def test_equal_values_are_told_apart():
    assert len(covering.pairwise({"a": [1, True], "b": [[], {}]})) == 4, (
        "by position: values need be neither hashable nor unequal"
    )

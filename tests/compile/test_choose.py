"""The choice of algorithms: the fastest of each layer size, once, and nothing of the batch in it."""

import sys

import pytest
import torch
from compiled_networks import NETWORKS
from tiny import awake

from fastdiff.compile import program_of
from fastdiff.compile.choose import MARGIN
from fastdiff.compile.program import LIBRARY

choose = sys.modules["fastdiff.compile.choose"]


@pytest.fixture
def clock(monkeypatch):
    """install(seconds of an algorithm): a clock that times by name; returns the names that were timed."""
    timed = []
    trial = choose._trial

    def install(seconds):
        def named(step, program, name, batch):
            timed.append((step.name, name, batch))
            return [], name

        monkeypatch.setattr(choose, "_trial", named)
        monkeypatch.setattr(choose, "_seconds", lambda v, name, elsewhere: seconds[name])
        monkeypatch.setattr(choose, "candidates", lambda step, dtype: ["library", "direct"])
        assert trial is not named
        return timed

    return install


@pytest.mark.parametrize(("direct", "expected"), [(0.5, "direct"), (0.99, LIBRARY), (2.0, LIBRARY)])
def test_the_fastest_is_chosen(clock, direct, expected):
    """The earlier one where they are about as fast."""
    assert 0.9 < MARGIN < 0.99
    timed = clock({"library": 1.0, "direct": direct})
    network = awake(NETWORKS["ddpm"])
    program = program_of(network, torch.float32, batch=3)
    assert set(program.algorithms.values()) == {expected}
    sizes = {(*s.weight.shape[:2], *program.sizes[s.name]) for s in program.convolutions}
    assert len(timed) == 2 * len(sizes), "each layer size is measured once"
    assert {batch for _, _, batch in timed} == {3}


def test_given_choices_are_not_measured(clock):
    timed = clock({})
    network = awake(NETWORKS["ddpm"])
    program = program_of(network, torch.float32, choices={n: "direct" for n, _ in network.named_modules()})
    assert set(program.algorithms.values()) == {"direct"} and not timed


def test_a_trial_runs_the_step():
    """What is timed is the step itself, norm, residual and statistics included."""
    network = awake(NETWORKS["adm"])
    state = torch.get_rng_state()
    program = program_of(network, torch.float32)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    fresh = type(program)(network, torch.float32, program.size)
    for step in fresh.convolutions:
        for name in choose.candidates(step, torch.float32):
            v, run = choose._trial(step, fresh, name, 2)
            with torch.inference_mode():
                seconds = choose._seconds(v, run, torch.ones(8))
            assert seconds > 0 and v[step.out].shape[:2] == (2, step.weight.shape[0])
            assert torch.isfinite(v[step.out]).all()
            assert step.packed is None and step.library is None, "the step itself is left as it was"

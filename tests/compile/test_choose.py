"""The choice of algorithms: the fastest of each layer size, once, and nothing of the batch in it."""

import json
import os
import sys

import pytest
import torch
from compiled_networks import NETWORKS
from tiny import awake

from fastdiff import cache
from fastdiff.compile import measured, program_of
from fastdiff.compile.choose import MARGIN
from fastdiff.compile.program import LIBRARY

choose = sys.modules["fastdiff.compile.choose"]


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    """A cache folder of its own, and a process that has measured nothing."""
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def clock(monkeypatch, nothing_known):
    """install(seconds of an algorithm): a clock that times by name; returns the names that were timed."""
    timed = []

    def install(seconds):
        def named(step, program, name, given):
            timed.append((step.name, name, len(given[step.x])))
            return [], name

        monkeypatch.setattr(choose, "_trial", named)
        monkeypatch.setattr(choose, "_seconds", lambda v, name, elsewhere: seconds[name])
        monkeypatch.setattr(choose, "candidates", lambda step, dtype: ["library", "direct"])
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


@pytest.mark.parametrize(("seconds", "expected"), [(0.93, "winograd4_lean"), (0.85, "winograd4")])
def test_many_weights_must_pay(clock, monkeypatch, seconds, expected):
    """Four times the memory for less than a tenth of the time is not taken."""
    clock({"library": 9.0, "winograd4_lean": 1.0, "winograd4": seconds})
    monkeypatch.setattr(choose, "candidates", lambda step, dtype: ["library", "winograd4_lean", "winograd4"])
    program = program_of(awake(NETWORKS["ddpm"]), torch.float32)
    assert set(program.algorithms.values()) == {expected}


@pytest.mark.parametrize(
    ("isa", "outputs", "side", "more"),
    [
        ("avx512", 64, 16, ["winograd6"]),
        ("avx512", 64, 8, []),
        ("avx512", 32, 8, ["winograd4"]),
        ("avx512", 32, 32, ["winograd6", "winograd4"]),
        ("avx2", 64, 32, ["winograd4"]),
    ],
)
def test_what_is_measured(monkeypatch, isa, outputs, side, more):
    """Weights four times as large only where they can win: few registers, or few output channels for several threads."""
    names = ["library", "winograd4_lean", *["winograd6"] * (isa == "avx512"), "winograd4"]
    monkeypatch.setattr(choose, "candidates", lambda step, dtype: names)
    monkeypatch.setattr(choose.ops, "native", lambda: f"native code for {isa} (cpu)")
    step = choose.Conv3x3(0, "conv", 0, torch.zeros(outputs, 8, 3, 3), torch.zeros(outputs))
    assert choose.worth_measuring(step, torch.float32, (side, 2 * side)) == [*names[:2], *more]


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
        given = choose._noise(step, fresh, 2)
        for name in choose.candidates(step, torch.float32):
            v, run = choose._trial(step, fresh, name, given)
            with torch.inference_mode():
                seconds = choose._seconds(v, run, torch.ones(8))
            assert seconds > 0 and v[step.out].shape[:2] == (2, step.weight.shape[0])
            assert torch.isfinite(v[step.out]).all()
            assert step.packed is None and step.library is None, "the step itself is left as it was"


def test_what_is_behind_is_given_up(monkeypatch):
    """Runs: all of them near the best, one where a candidate takes half as long again, two where two are long enough."""

    def runs(seconds, best):
        calls = []
        monkeypatch.setattr(choose, "_seconds", lambda v, run, elsewhere: calls.append(1) or seconds)
        choose._least([], None, None, best)
        return len(calls)

    assert runs(1e-3, 1e-3) == choose.ROUNDS and runs(1.4e-3, 1e-3) == 2 and runs(1.6e-3, 1e-3) == 1
    assert runs(choose.SECONDS, float("inf")) == 2


def test_choices_are_kept(clock, nothing_known):
    """The second program of the same layers measures none, in this process and in another that reads the file."""
    timed = clock({"library": 1.0, "direct": 0.5})
    network = awake(NETWORKS["ddpm"])
    first = program_of(network, torch.float32, batch=3)
    count = len(timed)
    assert program_of(network, torch.float32, batch=3).algorithms == first.algorithms and len(timed) == count
    measured.forget()
    clock({"library": 0.5, "direct": 1.0})
    assert program_of(network, torch.float32, batch=3).algorithms == first.algorithms and len(timed) == count
    program_of(network, torch.float32, batch=4)
    assert len(timed) == 2 * count, "another batch is another measurement"
    (name,) = nothing_known.glob("choices-*-float32-b3-*.json")
    assert set(json.loads(name.read_text())["choices"].values()) == {"direct"}
    assert not [path for path in nothing_known.iterdir() if path.suffix != ".json"], "nothing half-written is left"


DAMAGE = {
    "empty": lambda text: "",
    "truncated": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[1]",
    "choices of no kind": lambda text: text.replace('"choices": {', '"choices": [], "rest": {'),
    "numbers": lambda text: text.replace('"direct"', "7"),
    "an algorithm of another release": lambda text: text.replace('"direct"', '"strassen"'),
    "another machine": lambda text: text.replace('"processor": "', '"processor": "a better '),
    "another build": lambda text: text.replace('"build": "', '"build": "0'),
    "nested": lambda text: "[" * 100_000,
    "long": lambda text: text + " " * measured.LARGEST,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_files(clock, nothing_known, damage):
    """They are measured anew, and written as they should be."""
    timed = clock({"library": 1.0, "direct": 0.5})
    network = awake(NETWORKS["ddpm"])
    program_of(network, torch.float32)
    count, (path,) = len(timed), nothing_known.iterdir()
    sound = path.read_text()
    path.write_text(DAMAGE[damage](sound))
    assert path.read_text() != sound
    measured.forget()
    assert set(program_of(network, torch.float32).algorithms.values()) == {"direct"}
    assert len(timed) == 2 * count and path.read_text() == sound


def test_what_was_first_stays(clock, nothing_known):
    """Of two processes that measured at once, the one that wrote first is believed from then on."""
    clock({"library": 1.0, "direct": 0.5})
    network = awake(NETWORKS["ddpm"])
    program_of(network, torch.float32)
    mine = measured.choices(torch.float32, 1)
    (path,) = nothing_known.iterdir()
    theirs = path.read_text().replace('"direct"', '"library"')
    path.write_text(theirs)
    mine.fresh = True
    mine.write()
    assert path.read_text() == theirs
    assert set(program_of(network, torch.float32).algorithms.values()) == {"direct"}, "here nothing changes"


@pytest.mark.parametrize("where", ["off", "a file", "no such place", "read-only"])
def test_no_cache(clock, nothing_known, monkeypatch, where):
    """Measured all the same, once a process."""
    path = nothing_known / "here"
    if where == "a file":
        path.write_text("")
    elif where == "read-only":
        path.mkdir(mode=0o500)
    elif where == "no such place":
        path = "/proc/1/fastdiff"
    monkeypatch.setenv("FASTDIFF_CACHE", "off" if where == "off" else str(path))
    timed = clock({"library": 1.0, "direct": 0.5})
    network = awake(NETWORKS["ddpm"])
    program_of(network, torch.float32)
    count = len(timed)
    program_of(network, torch.float32)
    assert count == len(timed) > 0
    if where != "read-only" or os.getuid():  # root may write there
        assert not list(nothing_known.rglob("*.json"))


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("FASTDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fastdiff" and cache.folder().is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache.folder() == tmp_path / ".cache" / "fastdiff"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "fastdiff"
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"

"""A compiled program in a file: the same bits in another process, nothing copied, other machines' packing not trusted."""

import json
import warnings

import pytest
import torch
from compiled_networks import model_of

import fastdiff
from fastdiff.compile import store

SEEDS = range(3)


@pytest.fixture(params=["lossless", "high"])
def saved(request, tmp_path):
    fast = fastdiff.compile(model_of("ddpmpp"), nfe=2, quality=request.param)
    path = tmp_path / "fast.safetensors"
    fast.save(path)
    return fast, path


def test_round_trip(saved):
    fast, path = saved
    again = fastdiff.load(path)
    assert isinstance(again, fastdiff.Compiled) and again.quality == fast.quality and again.hash() == fast.hash()
    assert again.program.algorithms == fast.program.algorithms
    assert again.program.conditions.times() == fast.program.conditions.times() != []
    assert torch.equal(fastdiff.sample(again, 2, seeds=SEEDS), fastdiff.sample(fast, 2, seeds=SEEDS))
    assert all(torch.equal(v, again.state[k]) for k, v in fast.state.items())


def test_save_again_and_the_model_alone(saved, tmp_path):
    """What was loaded can be saved, with its program and without."""
    fast, path = saved
    again = fastdiff.load(path)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    again.save(path)  # over the file that it maps
    assert torch.equal(fastdiff.sample(again, 2, seeds=SEEDS), fastdiff.sample(fast, 2, seeds=SEEDS))
    again.plain.save(tmp_path / "plain.safetensors")
    plain = fastdiff.load(tmp_path / "plain.safetensors")
    assert not isinstance(plain, fastdiff.Compiled) and plain.hash() == fast.hash()


def test_packed_weights_are_mapped_and_aligned(saved):
    _, path = saved
    fast = fastdiff.load(path)
    memory = {t.untyped_storage().data_ptr() for t in fast.state.values()}
    assert len(memory) == 1, "one mapping of the file holds all weights"
    for step in fast.program.convolutions:
        if step.packed is not None:
            assert step.packed.untyped_storage().data_ptr() in memory and step.packed.data_ptr() % store.ALIGNMENT == 0


def test_weights_stay_the_callers(saved):
    """The mapping is private: training what was loaded changes no file."""
    _, path = saved
    before = path.read_bytes()
    again = fastdiff.load(path)
    again.original.conv_in.weight.data.add_(1.0)
    assert path.read_bytes() == before


ELSEWHERE = {"machine": lambda device: {"fastdiff": "9.9", "native": "other"}, "PACKING": 0}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_another_machine(saved, monkeypatch, what):
    """Weights packed for another instruction set, or otherwise than today, are not used: compiled again, and said."""
    fast, path = saved
    monkeypatch.setattr(store, what, ELSEWHERE[what])
    with pytest.warns(UserWarning, match="packed on another machine or release; compiling again"):
        again = fastdiff.load(path)
    expected, got = (fastdiff.sample(m, 2, seeds=SEEDS) for m in (fast, again))
    assert (expected - got).abs().max() <= (4e-5 if fast.quality == "lossless" else 0.5)


def test_a_processor_without_native_code(saved, monkeypatch):
    fast, path = saved
    monkeypatch.setattr(store, "obstacle", lambda network: "no native code")
    with pytest.warns(UserWarning, match="cannot run, its network does instead: no native code"):
        plain = fastdiff.load(path)
    assert not isinstance(plain, fastdiff.Compiled) and plain.hash() == fast.hash()


def _rewrite(path, change):
    """Change the description in the file's header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    description = json.loads(header["__metadata__"]["fastdiff"])
    change(description["program"])
    header["__metadata__"]["fastdiff"] = json.dumps(description)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


DAMAGE = {
    "quality": lambda p: p.update(quality="best"),
    "no quality": lambda p: p.pop("quality"),
    "size": lambda p: p.update(size="large"),
    "times": lambda p: p.update(times=["a"]),
    "algorithms": lambda p: p.update(algorithms=7),
    "attention": lambda p: p.update(attention=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_descriptions(tmp_path, damage):
    path = tmp_path / "fast.safetensors"
    fastdiff.compile(model_of("ddpm")).save(path)
    _rewrite(path, DAMAGE[damage])
    with pytest.raises(fastdiff.CheckpointError, match="incomplete or inconsistent"):
        fastdiff.load(path)


def test_truncated(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(fastdiff.CheckpointError, match="truncated"):
        fastdiff.load(path)


def test_unknown_algorithms_are_measured_anew(tmp_path):
    """A file that names an algorithm this release has not."""
    path = tmp_path / "fast.safetensors"
    fast = fastdiff.compile(model_of("ddpm"))
    fast.save(path)
    _rewrite(path, lambda p: p.update(algorithms=dict.fromkeys(p["algorithms"], "strassen")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastdiff.load(path)
    assert (fastdiff.sample(again, 2, seeds=SEEDS) - fastdiff.sample(fast, 2, seeds=SEEDS)).abs().max() <= 4e-5

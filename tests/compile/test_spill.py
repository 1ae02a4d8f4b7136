"""Weights in a mapped file: the same values, nothing left behind, and memory where there is no room."""

import copy
import gc
import os
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from compiled_networks import model_of

import fastdiff
from fastdiff import UNet, UNetConfig, schedules
from fastdiff.compile import program, spill
from fastdiff.ops import conv3x3_algorithms

SEEDS = range(3)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty cache folder on a disk, in which every network is large."""
    monkeypatch.setattr(spill, "SMALL", 0)
    monkeypatch.setattr(spill, "_in_memory", lambda folder: False)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    return tmp_path


def files_of(folder):
    """What this process maps from files that were in the folder, most of them nameless."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


def test_compile(folder):
    """Both the packed weights and the originals; the model that was compiled is left as it was."""
    model = model_of("ddpmpp")
    before = {name: t.data_ptr() for name, t in model.state.items()}
    expected = fastdiff.sample(model, 2, seeds=SEEDS, compile="off")
    fast = fastdiff.compile(model, nfe=2)
    assert {name: t.data_ptr() for name, t in model.state.items()} == before
    assert (fastdiff.sample(fast, 2, seeds=SEEDS) - expected).abs().max() <= 4e-5
    assert files_of(folder) and not [path for path in folder.iterdir() if path.suffix != ".json"], "the file has no name"
    where = fastdiff.run(fast, 2, seeds=SEEDS).engine
    assert where == f"fast: {fast.program.where}" and "MB of weights are mapped from a nameless file in" in where
    areas = [range(int(a, 16), int(b, 16)) for a, b in (line.split()[0].split("-") for line in files_of(folder))]
    packed = [step.packed for step in fast.program.convolutions if step.packed is not None]
    assert packed
    for t in (*packed, *fast.original.parameters()):
        assert any(t.data_ptr() in area for area in areas)
    assert fast.hash() == model.hash() and fast.original.training == model.network.training
    flags = [[p.requires_grad for p in net.parameters()] for net in (fast.original, model.network)]
    assert flags[0] == flags[1]


def test_save(folder):
    """What is mapped is saved, and loaded again."""
    fast = fastdiff.compile(model_of("ddpmpp"))
    fast.save(folder / "fast.safetensors")
    again = fastdiff.load(folder / "fast.safetensors")
    assert again.hash() == fast.hash()
    assert torch.equal(fastdiff.sample(again, 2, seeds=SEEDS), fastdiff.sample(fast, 2, seeds=SEEDS))


def test_sample(folder, monkeypatch):
    """A program that sample makes maps its packed weights; the network stays the caller's."""
    monkeypatch.setattr(program, "LIGHT", 0)
    model = model_of("ddpmpp")
    result = fastdiff.run(model, 2, seeds=SEEDS, compile="fast")
    assert "mapped from a nameless file" in result.engine
    again = fastdiff.run(copy.deepcopy(model), 2, seeds=SEEDS, compile="fast")
    assert torch.equal(again.images, result.images)


def test_space_is_given_back(folder):
    fast = fastdiff.compile(model_of("ddpm"))
    assert files_of(folder)
    del fast
    gc.collect()
    assert not files_of(folder)
    assert not [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if _open_in(folder, n)]


def _open_in(folder, number):
    try:
        return str(folder) in os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False


# By algorithms of our own, whatever is fastest here: the library keeps its weights in memory.
HELD = """
import gc, sys, fastdiff, fastdiff.compile
def now():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1024
sys.modules["fastdiff.compile.choose"]._measure = lambda step, program, names, *given: names[-1]
fastdiff.sample("mnist-ect", 2, seeds=[0])
gc.collect()
before = now()
model = fastdiff.load(sys.argv[1])
loaded = now()
model = fastdiff.compile(model)
fastdiff.sample(model, 1, seeds=[0])
gc.collect()
print(model.program.where, now() - before, loaded - before, sep="|")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(len(conv3x3_algorithms(torch.float32)) == 1, reason="fastdiff._C is not built")
def test_nothing_is_held_of_the_model_that_was_compiled(tmp_path):
    config = UNetConfig(resolution=8, channels=128, multipliers=(2, 2), blocks=1, attention=(), dropout=0.0)
    model = fastdiff.wrap(UNet(config), schedule=schedules.DDPM(), shape=(3, 8, 8))
    size = sum(p.nbytes for p in model.network.parameters()) / 2**20
    assert size > spill.SMALL / 2**20
    model.save(tmp_path / "model.safetensors")
    environment = os.environ | {"FASTDIFF_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", HELD, str(tmp_path / "model.safetensors")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    where, held, loaded = out.strip().split("|")
    assert "mapped" in where or spill._in_memory(tmp_path)
    assert float(loaded) > 0.9 * size and (float(held) < 0.7 * size or not where), out


def test_writing_changes_no_other(folder):
    """Pages are copied where somebody writes: two programs of one network, and an original that is trained."""
    model = model_of("ddpm")
    fast = fastdiff.compile(model)
    expected = fastdiff.sample(model, 2, seeds=SEEDS, compile="off")
    with torch.no_grad():
        for p in fast.original.parameters():
            p.mul_(2.0)
    assert torch.equal(fastdiff.sample(model, 2, seeds=SEEDS, compile="off"), expected)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("room", ["none", "for a part", "an error"])
def test_a_full_disk(folder, monkeypatch, room):
    """Said once, with the folder and the remedy; what does not fit stays in memory and computes the same."""
    model = model_of("ddpm")
    expected = fastdiff.compile(model)
    frees = iter([spill.RESERVE + 2**20] * 3 if room == "for a part" else [])
    if room == "an error":

        def full(*given):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(spill, "_write", full)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, next(frees, 5 * 2**20)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast = fastdiff.compile(model)
    why = "No space left" if room == "an error" else "5 MB are free, of which 1,024 are left alone"
    assert len(said) == 1, [str(w.message) for w in said]
    text = str(said[0].message)
    assert "weights stay in memory" in text and why in text and str(folder) in text and "FASTDIFF_CACHE" in text
    assert torch.equal(fastdiff.sample(fast, 2, seeds=SEEDS), fastdiff.sample(expected, 2, seeds=SEEDS))
    assert bool(fast.program.where) == (room == "for a part")


def test_memory_is_no_place(monkeypatch, folder):
    """Small networks, folders that are memory, and none: no file and no word."""
    model = model_of("ddpm")
    monkeypatch.setattr(spill, "_in_memory", lambda folder: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = fastdiff.compile(model)
        assert fast.original is model.network and not fast.program.where
        monkeypatch.setenv("FASTDIFF_CACHE", "off")
        assert not fastdiff.compile(model).program.where
        monkeypatch.undo()
        assert not fastdiff.compile(model).program.where
    assert fastdiff.run(model, 2, seeds=SEEDS, compile="fast").engine == "fast"


def test_what_is_memory():
    shared = Path("/dev/shm")
    if not shared.is_dir() or "tmpfs /dev/shm tmpfs" not in Path("/proc/mounts").read_text().replace(
        "shm /dev", "tmpfs /dev"
    ):
        pytest.skip("no tmpfs here")
    assert spill._in_memory(shared) and not spill._in_memory(Path("/proc"))

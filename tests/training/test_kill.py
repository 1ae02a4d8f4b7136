"""kill -9 at random moments: the run that goes on ends with the bits of a run left alone."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from toy_training import toy_run


@pytest.fixture(scope="module")
def processes():
    """Child processes that start in a moment: a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training"])
    return context


def wait_for_another(path, before, process):
    """Until the file at `path` is newer than `before`; a checkpoint is whole at any moment."""
    deadline = time.monotonic() + 240
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.is_alive() if hasattr(process, "is_alive") else process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random(kills, processes, tmp_path):
    """Some steps further on each time, within a step or a write: weights, averages, target and losses are the same."""
    steps, rng = 12 * kills, random.Random(kills)
    whole = processes.Process(target=toy_run, args=(tmp_path / "whole", steps, {}))
    whole.start()
    state, reached = tmp_path / "cut" / "state.pt", []
    for _ in range(kills):
        process = processes.Process(target=toy_run, args=(tmp_path / "cut", steps, {"keep": 2}))
        process.start()
        wait_for_another(state, state.stat().st_mtime_ns if state.exists() else 0, process)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(torch.load(state, weights_only=True)["step"])
    assert reached == sorted(set(reached)) and reached[-1] < steps, f"the run was not killed in the middle: {reached}"
    last = processes.Process(target=toy_run, args=(tmp_path / "cut", steps, {}))
    last.start()
    for process in (last, whole):
        process.join()
        assert process.exitcode == 0
    for name in ("model", "model-ema-50"):
        one, two = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "cut"))
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    one, two = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "cut"))
    assert all(torch.equal(v, two["network"][k]) for k, v in one["network"].items())
    assert all(torch.equal(v, two["loss"]["target"][k]) for k, v in one["loss"]["target"].items())
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "cut" / "loss.csv").read_text()


def command(*words):
    return [sys.executable, "-m", "fastdiff.cli", *map(str, words)]


def started(words):
    # One thread: the order of sums, and so the last bits, is then the same whatever else the machine does.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_command_killed_and_resumed(mnist_folder, tmp_path):
    """A real `fastdiff train`, killed in the middle, and `fastdiff resume`."""
    settings = ["--data", mnist_folder, "--images", 96, "--batch", 4, "--checkpoint-every", 4, "--report-every", 0]
    train = command("train", "--preset", "mnist-edm", *settings, "--out")
    finished(started([*train, str(tmp_path / "whole")]))
    process, state = started([*train, str(tmp_path / "cut")]), tmp_path / "cut" / "state.pt"
    wait_for_another(state, 0, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = torch.load(state, weights_only=True)["step"]
    output = finished(started(command("resume", tmp_path / "cut")))
    assert f"continuing at {4 * step} of 96 images" in output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())

"""kill -9 in the middle of a real `fastdiff train`: the same command again ends with the weights of a run left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file


def command(data, out):
    return [
        *(sys.executable, "-m", "fastdiff.cli", "train", "--preset", "mnist-edm", "--data", str(data), "--out", str(out)),
        # 24 steps with a checkpoint after each: most of the time is spent near or in a write
        *("--images", "96", "--batch", "4", "--checkpoint-every", "4", "--report-every", "0"),
    ]


def start(data, out):
    # One thread: the order of sums, and so the last bits, is then the same whatever else the machine does.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(data, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed(mnist_folder, tmp_path):
    finish(start(mnist_folder, tmp_path / "whole"))
    state, rng, steps = tmp_path / "cut" / "state.pt", random.Random(0), []
    for _ in range(2):
        process = start(mnist_folder, tmp_path / "cut")
        before, deadline = state.stat().st_mtime_ns if state.exists() else 0, time.monotonic() + 120
        while not (state.exists() and state.stat().st_mtime_ns != before):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))  # somewhere within the next steps and writes
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Never half-written: whatever moment that was, the checkpoint is whole.
        steps.append(torch.load(state, weights_only=True)["step"])
    assert steps == sorted(set(steps)) and steps[-1] < 24, f"the run was not killed in the middle: {steps}"
    output = finish(start(mnist_folder, tmp_path / "cut"))
    assert f"continuing at {4 * steps[-1]} of 96 images" in output
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(v, cut[k]) for k, v in whole.items())
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "cut" / "loss.csv").read_text()

"""Two processes at half the batch make the steps of one at the whole."""

import dataclasses
import multiprocessing
import socket

import pytest
import torch
from ranks_training import configs, run
from safetensors.torch import load_file

from fastdiff.training import checks
from fastdiff.training.distributed import Group, joined


def test_two_ranks_equal_one(tmp_path):
    """Weights after ten steps within 1e-5, losses too; loss-aware times and target networks agree."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_training"])
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = [context.Process(target=run, args=(r, world, port, tmp_path / str(world))) for r in range(world)]
        for process in started:
            process.start()
        for process in started:
            process.join()
            assert process.exitcode == 0
    for name in configs():
        one, two = (load_file(tmp_path / world / name / "model.safetensors") for world in "12")
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, rtol=0, atol=1e-5, msg=lambda text, k=key, n=name: f"{n} {k}: {text}"
            )
        logs = [(tmp_path / world / name / "loss.csv").read_text().split() for world in "12"]
        for a, b in zip(*(map(str.split, log[1:], "," * 10) for log in logs), strict=True):
            assert a[:2] == b[:2] and float(a[2]) == pytest.approx(float(b[2]), rel=1e-4)
    histories = [torch.load(tmp_path / w / "iddpm" / "state.pt", weights_only=True)["loss"]["history"] for w in "12"]
    torch.testing.assert_close(*histories, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_shares_of_a_batch():
    """Refused before the first step where they would not be equal."""
    config = configs()["edm"]
    with pytest.raises(
        ValueError, match=r"batch: 16 images cannot be shared by 3 processes in 2 parts each; give a multiple of 6"
    ):
        checks.check_config(dataclasses.replace(config, accumulate=2), world=3)


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(torch.device("cpu")) as (group, device):
        assert group == Group() and group.leads and device == torch.device("cpu")
    x = torch.ones(2)
    group.average([x])
    assert torch.equal(x, torch.ones(2)) and group.any(True) and not group.any(False)

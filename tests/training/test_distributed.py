"""Two processes at half the batch make the steps of one at the whole."""

import dataclasses
import multiprocessing
import os
import socket

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny

import fastdiff
from fastdiff.training import ImageData, TrainConfig, Trainer, checks
from fastdiff.training.distributed import Group, joined


def configs():
    """Losses of every kind of state; dropout is off, since each process drops units of its own."""
    base = TrainConfig(
        "edm", tiny(labels=2, dropout=0.0), fastdiff.schedules.EDM(), fastdiff.Prediction("edm"), images=160, batch=16,
        warmup=64, bf16=False, flip=True,
    )  # fmt: skip
    learned = fastdiff.Prediction("eps", learned_variance=True)
    return {
        "edm": base,
        "accumulate": dataclasses.replace(base, accumulate=2),
        "ct": dataclasses.replace(base, loss="ct", prediction=fastdiff.Prediction("consistency"), options={"s1": 20}),
        "iddpm": dataclasses.replace(
            base, loss="iddpm", network=dataclasses.replace(base.network, out_channels=2), prediction=learned,
            schedule=fastdiff.schedules.DDPM(T=4), options={"importance": True},
        ),
    }  # fmt: skip


def run(rank, world, port, folder):
    """One process of `world`, all configurations in turn."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with joined(torch.device("cpu")) as (group, device):
        for name, config in configs().items():
            data = ImageData(images, torch.arange(24) % 2)
            trainer = Trainer(config, data, folder / name, device=device, group=group, report_every=0, checkpoint_every=32,
                              progress=False)  # fmt: skip
            trainer.train()
            folder.joinpath(f"{name}-{rank}.step").write_text(str(trainer.step))


def test_two_ranks_equal_one(tmp_path):
    """Weights after ten steps within 1e-5, losses too; loss-aware times and target networks agree."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training"])
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

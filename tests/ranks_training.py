"""What the processes of tests/training/test_distributed.py run: a module of its own, which each of them can import."""

import dataclasses
import os

import torch
from tiny import tiny

import fastdiff
from fastdiff.training import ImageData, TrainConfig, Trainer
from fastdiff.training.distributed import joined


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

"""`fastdiff train-classifier`."""

import shlex
import sys
from pathlib import Path

import torch
import typer

from fastdiff.commands.sample_command import check_folder
from fastdiff.training import load_images
from fastdiff.training.classifier import accuracy, train_classifier


def run(data: Path, out: Path, epochs: int, seed: int, rotations: bool, size: int | None, device: str | None) -> None:
    """Train, measure what the stored weights get right, write."""
    check_folder(out)
    if epochs < 1:
        raise ValueError(f"epochs: {epochs} makes no training; give a number >= 1")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = load_images(data, size=size, seed=0).to(target)
    name = images.about.get("name", data.name)
    net = train_classifier(images, epochs, seed=seed, rotations=rotations, device=target, say=typer.echo).rounded()
    try:
        held, what = load_images(data, train=False, size=size), "test"
    except FileNotFoundError:
        held, what = images, "training"
    right = accuracy(net, held)
    net.info |= {
        "accuracy": right,
        "command": shlex.join(["fastdiff", *sys.argv[1:]]),
        "data": f"{name}, {len(images):,} training images; accuracy on the {len(held):,} {what} images",
        "versions": {"torch": str(torch.__version__)},
        "threads": torch.get_num_threads(),
    }
    net.save(out)
    turns = " of quarter turns" if rotations else ""
    typer.echo(f"{what} accuracy{turns} {right:.4%}; wrote {out} ({out.stat().st_size:,} bytes)")

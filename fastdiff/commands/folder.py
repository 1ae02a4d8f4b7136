"""Many images, one file each, named by seed: work that can be shared by processes, killed and run again."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

from fastdiff.atomic import atomically, remove_leftovers
from fastdiff.images import save_image
from fastdiff.model import Model
from fastdiff.sample import run

REQUEST = "request.json"


def write(model: Model, request: dict[str, Any], out: Path, batch_size: int | None, options: dict[str, Any]) -> None:
    """Draw request["seeds"] batch by batch into `out`; what is there already is left alone.

    Batches are cut from the list of seeds, whatever is missing and however many processes there are (torchrun's RANK and
    WORLD_SIZE), so that an image is the same in every division of the work. No more than a batch is in memory. Half-written
    files of processes that were killed are removed. The network runs as it is, since a program of `fastdiff.compile` chooses
    its algorithms by the clock, another on another machine; --compile fast prefers speed to equal bytes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = request["device"]
    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    seeds, labels = request["seeds"], request["labels"]
    size = batch_size or (64 if device is None or device == "cpu" else 256)
    _claim(out, model, request, size)
    written = there = 0
    try:
        for first, part in _shares(seeds, size, rank, world):
            missing = [k for k, seed in enumerate(part) if not path_of(out, seed).exists()]
            there += len(part) - len(missing)
            if not missing:
                continue
            own = labels[first : first + size] if labels is not None and len(labels) > 1 else labels
            result = run(
                model,
                request["nfe"],
                seeds=part,
                labels=own,
                sampler=request["sampler"],
                batch_size=size,
                device=device,
                dtype=request["dtype"],
                quality=request["quality"],
                compile=request["compile"],
                progress=False,
                **options,
            )
            for k in missing:
                save_image(result.images[k], path_of(out, part[k]))
                written += 1
    except KeyboardInterrupt:
        typer.echo(f"{out}: stopped, {written} written; the same command goes on from here", err=True)
        raise
    share = "" if world == 1 else f" by process {rank} of {world}"
    typer.echo(f"{out}: {written} image{'s' if written != 1 else ''} written{share}, {there} there already")


def path_of(out: Path, seed: int) -> Path:
    return out / f"{seed:06d}.png"


def _shares(seeds: list[int], size: int, rank: int, world: int) -> Iterator[tuple[int, list[int]]]:
    """This process' batches: every world-th, from the rank-th on, with where each begins."""
    return ((first, seeds[first : first + size]) for first in range(rank * size, len(seeds), world * size))


def _claim(out: Path, model: Model, request: dict[str, Any], size: int) -> None:
    """Note in the folder what its images are; refuse one that holds images of another request."""
    about = {k: request[k] for k in ("nfe", "sampler", "times", "options", "labels", "quality", "compile")}
    about |= {"model_hash": model.hash(), "dtype": str(request["dtype"]).removeprefix("torch."), "batch_size": size}
    text = json.dumps(about, indent=1, sort_keys=True) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    path = out / REQUEST
    if path.exists():
        before = {"quality": "lossless", "compile": "off"} | json.loads(path.read_text())
        differing = [k for k in about if before.get(k) != about[k]]
        if differing:
            raise ValueError(
                f"out: {out} holds images of another request ({', '.join(differing)} differ); choose another folder"
            )
        return

    def put(temporary: str) -> None:
        Path(temporary).write_text(text)

    atomically(path, put)

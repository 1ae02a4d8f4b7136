"""`fastdiff eval`."""

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Any

import typer

from fastdiff.atomic import atomically
from fastdiff.commands.sample_command import DTYPES, check_folder, parse_options
from fastdiff.info import versions
from fastdiff.metrics import Reference, evaluate, load_classifier, packaged_classifier, table
from fastdiff.metrics.classifier import COMMAND
from fastdiff.model import Model, load
from fastdiff.training import load_images


def run(
    models: list[str],
    data: Path,
    nfe: str,
    n: int,
    first_seed: int,
    sampler: str,
    option: list[str] | None,
    classifier: Path | None,
    batch_size: int | None,
    device: str | None,
    dtype: str,
    out: Path | None,
) -> None:
    """Check everything, then measure each model at each number of evaluations; JSON grows row by row."""
    counts = parse_nfe(nfe)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if out is not None:
        check_folder(out)
    loaded = [(name, load(name)) for name in models]
    judge = load_classifier(judge_of(classifier, loaded))
    images = load_images(data, shape=loaded[0][1].shape)
    for name, model in loaded:
        if model.shape is not None and tuple(model.shape) != images.shape:
            raise ValueError(
                f"data: its images are {images.shape}, {name} makes {tuple(model.shape)}; give the model's data set"
            )
    reference = Reference.of(images.images, images.labels, judge)
    name = images.about.get("name", data)
    typer.echo(
        f"judge: {judge.name}; data: {len(images):,} images of {name}, a half each for reference and floor. FD is no FID."
    )
    rows: list[dict[str, Any]] = []
    record = {
        "classifier": judge.info | {"name": judge.name, "accuracy_here": reference.accuracy},
        "data": images.about | {"images": len(images), "fingerprint": images.fingerprint},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        "rows": rows,
    }
    for name, model in loaded:
        for k in counts:
            row = evaluate(
                model,
                reference,
                k,
                n,
                first_seed=first_seed,
                batch_size=batch_size,
                device=device,
                sampler=sampler,
                dtype=DTYPES[dtype],
                **parse_options(option or []),
            )
            lines = table([(Path(name).stem, row)]).splitlines()
            typer.echo("\n".join(lines if not rows else lines[1:]))
            rows.append({"model": name, "hash": model.hash(), "dtype": dtype} | dataclasses.asdict(row))
            if out is not None:
                _write(out, record)
    if out is not None:
        typer.echo(f"wrote {out}")


def _write(out: Path, record: dict[str, Any]) -> None:
    def put(temporary: str) -> None:
        Path(temporary).write_text(json.dumps(record, indent=1) + "\n")

    atomically(out, put)


def parse_nfe(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"nfe: {text!r} is no list of numbers of evaluations; write 1,2,4,35")
    return [int(part) for part in parts]


def judge_of(classifier: Path | None, loaded: list[tuple[str, Model]]) -> Path:
    """The file of the classifier: the one given, or a packaged one that fits every model."""
    if classifier is not None:
        return classifier
    packaged = packaged_classifier(loaded[0][1].shape)
    if packaged is None:
        raise ValueError(
            f"classifier: none is packaged for images {loaded[0][1].shape}; make one with {COMMAND} and give --classifier"
        )
    return packaged

"""`fastdiff sample`."""

import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer

from fastdiff.commands import folder
from fastdiff.images import read_metadata, save_grid
from fastdiff.info import versions
from fastdiff.model import load, packaged
from fastdiff.ops import implementations
from fastdiff.request import MANY, NFE, check_compile, check_quality
from fastdiff.sample import Samples
from fastdiff.sample import run as draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ENGINES = {"network": "off", "fast": "fast", "inductor": "inductor"}  # that computed -> compile=
# What sampling with a UNet runs
USED = ("philox_normal", "denoise_step", "group_norm_silu", "group_norm_attention", "embedding")


def run(
    model: str | None,
    nfe: int | None,
    n: int | None,
    seeds: str | None,
    labels: str | None,
    out: Path,
    like: Path | None,
    sampler: str | None,
    times: str | None,
    option: list[str] | None,
    batch_size: int | None,
    device: str | None,
    dtype: str | None,
    quality: str | None,
    compile: str | None,
) -> None:
    """Turn options into a request, refuse what cannot be written before sampling, sample, write and report."""
    given: dict[str, Any] = {
        "model": model,
        "nfe": nfe,
        "seeds": None if seeds is None else parse_seeds(seeds),
        "labels": None if labels is None else parse_numbers(labels, int, "labels"),
        "sampler": sampler,
        "times": None if times is None else parse_numbers(times, float, "times"),
        "options": parse_options(option) if option else None,
        "dtype": dtype,
        "quality": quality,
        "compile": compile,
    }
    usual = {"sampler": "auto", "dtype": "float32", "quality": "lossless", "compile": "auto"}
    request: dict[str, Any] = dict.fromkeys(given) | usual
    stored = {} if like is None else read_metadata(like)
    if like is not None and n is not None:
        raise ValueError("n: --like repeats the images of its file, seed by seed; leave --n out or give --seeds")
    request |= {k: v for k, v in stored.get("request", {}).items() if k in request}
    request |= {k: v for k, v in given.items() if v is not None}
    if given["seeds"] is not None and given["labels"] is None:
        request["labels"] = None
    if request["nfe"] is None and request["sampler"] != "rk45":
        request["nfe"] = NFE
    if request["dtype"] not in DTYPES:
        raise ValueError(f"dtype: {request['dtype']!r} is not supported; use one of {', '.join(DTYPES)}")
    check_quality(request["quality"])
    check_compile(request["compile"])
    options: dict[str, Any] = dict(request["options"] or {})
    options |= {} if request["times"] is None else {"times": request["times"]}
    if given["seeds"] is not None and (out.is_dir() or not out.suffix):
        many = MANY if request["sampler"] == "rk45" else request["nfe"]
        source = packaged(many) if request["model"] is None else request["model"]
        request |= {"device": device, "dtype": DTYPES[request["dtype"]], "compile": compile or "off"}
        return folder.write(load(source), request, out, batch_size, options)
    check_writable(out)
    result = draw(
        request["model"],
        request["nfe"],
        n=64 if n is None and request["seeds"] is None else n,
        seeds=request["seeds"],
        labels=request["labels"],
        sampler=request["sampler"],
        batch_size=batch_size,
        device=device,
        dtype=DTYPES[request["dtype"]],
        quality=request["quality"],
        compile=request["compile"],
        **options,
    )
    # what "auto" went for, so that --like does the same
    request |= {"seeds": result.seeds, "labels": result.labels, "compile": ENGINES[result.engine.partition(":")[0]]}
    save_grid(result.images, out, metadata(request, result))
    typer.echo(report(request["model"], out, result))
    warn_if_different(stored, result)


def parse_seeds(text: str) -> list[int]:
    """ "0-63", "5" or "1,5,9-12" -> the seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"seeds: {part.strip()!r} is no seed or range; write 0-63 or 1,5,9")
        if dash and int(last) < int(first):
            raise ValueError(f"seeds: the range {part.strip()} is empty; write the smaller seed first")
        seeds.extend(range(int(first), int(last or first) + 1))
    return seeds


def parse_numbers(text: str, kind: type, name: str) -> list[Any]:
    """Comma-separated numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} is no comma-separated list of {kind.__name__} values ({error})") from error


def parse_options(texts: list[str]) -> dict[str, Any]:
    """ "eta=0.5", "spacing=logsnr", "to_zero=false" -> the sampler's options; values are JSON, or else words."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"option: {text!r} is no option; write name=value, such as eta=0.5")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def check_writable(out: Path) -> None:
    """Refuse, before any work, a place where nothing can be written."""
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; give the name of a PNG file in it, or --seeds for a file of each image")
    if out.suffix.lower() != ".png":
        raise ValueError(f"out: {out} does not end in .png; images are written as PNG")
    check_folder(out)


def check_folder(out: Path) -> None:
    """Refuse, before any work, a file in a folder that is not there or cannot be written."""
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; give the name of a file in it")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out: the folder {out.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise PermissionError(f"out: cannot write in {out.parent.resolve()} ({os.strerror(error.errno or 0)})") from error


def metadata(request: dict[str, Any], result: Samples) -> dict[str, Any]:
    """What the PNG remembers: the request, and what it ran on."""
    return {
        "request": request,
        "plan": {"sampler": result.plan.name, "nfe": result.plan.nfe, "times": result.plan.times},
        "model_hash": result.model.hash(),
        "device": str(result.device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def report(model: str | None, out: Path, result: Samples) -> str:
    """What a person wants to know after a run."""
    n, kind = len(result.seeds), result.device.type
    served = implementations()
    name = f"packaged {packaged(result.plan.nfe).stem}" if model is None else str(model)
    return "\n".join(
        [
            f"{out}: {n} image{'s' if n != 1 else ''} from {name} (hash {result.model.hash()})",
            f"plan    {result.plan.describe()}",
            f"nfe     {result.evaluations} counted",
            f"speed   {n / result.seconds:.1f} images/s ({result.seconds:.2f} s on {result.device}, {result.dtype})",
            f"engine  {result.engine}",
            f"seeds   {result.seeds[0]} ... {result.seeds[-1]}",
            *[f"op      {op}: {served[op][kind].name}" for op in USED],
        ]
    )


def warn_if_different(stored: dict[str, Any], result: Samples) -> None:
    """Say so when --like met another model than the one that made the file."""
    if stored and stored.get("model_hash") != result.model.hash():
        typer.echo(
            f"warning: the file was made by a model with hash {stored.get('model_hash')}, this one is "
            f"{result.model.hash()}; the images will differ",
            err=True,
        )

"""`fastdiff convert`."""

import ast
from pathlib import Path
from typing import Any

import torch
import typer

from fastdiff.model import load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def options(given: list[str]) -> dict[str, Any]:
    """["image_size=64", "preset=cd_imagenet64"] -> {"image_size": 64, "preset": "cd_imagenet64"}."""
    values = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option: {item!r} is no NAME=VALUE, such as image_size=64 or use_new_attention_order=True")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text  # a word needs no quotes
    return values


def run(source: str, target: Path, given: list[str], dtype: str) -> None:
    """Read a checkpoint of any kind, write it as one of ours, and say what it is."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    model = load(source, **options(given))
    model.info = {"source": Path(source).name, **model.info}
    model.save(target, dtype=DTYPES[dtype])
    count = sum(p.numel() for p in model.network.parameters())  # type: ignore[attr-defined]
    classes = f", {model.labels} classes" if model.labels else ""
    typer.echo(
        f"wrote {target}: {count:,} parameters, images {model.shape}{classes}, prediction {model.prediction.kind} on "
        f"{type(model.schedule).__name__}, hash {load(target).hash()}"
    )

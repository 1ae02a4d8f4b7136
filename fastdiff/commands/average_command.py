"""`fastdiff average`."""

import copy
import shlex
import sys
from pathlib import Path

import torch
import typer

from fastdiff.model import Model, load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def average(models: list[Model]) -> Model:
    """One model with the mean of the others' weights (a model soup, Wortsman et al. 2022).

    It gains where the models were trained on from the same weights. Raises ValueError where they do not fit each other.
    """
    first = models[0]
    for other in models[1:]:
        for name in ("schedule", "prediction", "family", "shape", "labels"):
            if getattr(other, name) != getattr(first, name):
                a, b = getattr(first, name), getattr(other, name)
                raise ValueError(f"models: their {name} differs ({a}, {b}); give runs of one kind")
        if {k: v.shape for k, v in other.state.items()} != {k: v.shape for k, v in first.state.items()}:
            raise ValueError("models: their networks differ; give runs of the same architecture")
    mean = copy.deepcopy(first)
    for key, value in mean.state.items():
        value.copy_(torch.stack([m.state[key].double() for m in models]).mean(0))
    return mean


def run(models: list[str], out: Path, dtype: str) -> None:
    """Average, write, and keep the provenance of all parents."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    parents = [load(name) for name in models]
    mean = average(parents)
    commands = [p.info["command"] for p in parents if "command" in p.info]
    if len(parents) > 1:
        commands.append(shlex.join(["fastdiff", *sys.argv[1:]]))
    mean.info = parents[0].info | {"command": chain(commands)}
    mean.save(out, dtype=DTYPES[dtype])
    typer.echo(f"wrote {out}, hash {load(out).hash()}")


def chain(commands: list[str]) -> str:
    """Commands one after the other, each once, those that several parents share first."""
    steps = [step for command in commands for step in command.split(" && ")]
    return " && ".join(dict.fromkeys(steps))

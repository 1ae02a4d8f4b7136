"""`fastdiff train`."""

import dataclasses
import difflib
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import typer

import fastdiff
from fastdiff.commands.average_command import chain
from fastdiff.model import load
from fastdiff.training import PRESETS, Trainer, load_mnist


def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products are native: GPUs from sm_80, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def run(
    preset: str,
    data: Path,
    out: Path,
    init: str | None,
    changes: dict[str, Any],
    device: str | None,
    checkpoint_every: int,
    report_every: int,
    download: bool,
) -> None:
    """Check the request, then train to the end."""
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, 1, 0)
        raise ValueError(f"preset: {preset!r} is not known; did you mean {close[0]}? There are {', '.join(PRESETS)}")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, but this machine has no usable CUDA GPU; use --device cpu")
    config = PRESETS[preset]
    if changes.get("bf16") is None:
        changes["bf16"] = has_bf16(target)
    options = {k: v for k in ("p_mean", "p_std") if (v := changes.pop(k, None)) is not None}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    config = dataclasses.replace(config, options=config.options | options)
    _positive(config)
    if config.init and init is None:
        raise ValueError(f"init: {preset} starts from a trained {config.init} model; give --init RUN/model.safetensors")
    start = None if init is None else load(init)
    images = load_mnist(data, download=download, seed=config.seed)
    own = shlex.join(["fastdiff", *sys.argv[1:]])
    info = {
        "command": chain([*([] if start is None else [start.info.get("command", f"({init})")]), own]),
        "data": f"MNIST, {len(images)} training images",
        "licence": "Apache-2.0 (weights); trained on MNIST, CC BY-SA 3.0",
        "versions": {"fastdiff": fastdiff.__version__, "torch": str(torch.__version__)},
    }
    trainer = Trainer(
        config,
        images,
        out,
        init=start,
        device=target,
        checkpoint_every=checkpoint_every,
        report_every=report_every,
        info=info,
    )
    if report_every and importlib.util.find_spec("matplotlib") is None:
        typer.echo("loss.png needs matplotlib (pip install -e '.[train]'); the loss itself is in loss.csv")
    if trainer.step:
        typer.echo(f"continuing at {trainer.images:,} of {config.images:,} images")
    trainer.train()
    typer.echo(f"wrote {out / 'model.safetensors'}; try: fastdiff sample {out / 'model.safetensors'}")


def _positive(config) -> None:
    for name in ("images", "batch", "lr"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)} makes no training; give a number > 0")
    if not 0 <= config.seed < 2**23:
        raise ValueError(f"seed: {config.seed} is out of range; give 0 ... {2**23 - 1}")

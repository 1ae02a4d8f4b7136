"""`fastdiff train`, `distill` and `resume`."""

import dataclasses
from pathlib import Path
from typing import Any

import typer

from fastdiff.commands.runs import Request, execute
from fastdiff.denoiser import Prediction
from fastdiff.model import Model, load
from fastdiff.training import PRESETS, TrainConfig, checks, find_preset
from fastdiff.training.losses import LOSSES
from fastdiff.training.presets import data_of
from fastdiff.unet import UNet

METHODS = {"cd": "cifar10-cd-lpips", "ect": "cifar10-ect"}  # whose settings serve where no preset has the teacher's network


def train(preset: str, data: Path, out: Path, changes: dict[str, Any], options: dict[str, Any], **rest: Any) -> None:
    """A preset with changes, on the data in a folder."""
    config = find_preset(preset)
    download = data_of(preset) if rest.pop("fetch") else None
    config = changed(config, changes, options, rest.get("unconditional", False), rest.get("device"))
    teacher, init = rest.pop("teacher"), rest.pop("init")
    if LOSSES[config.loss].needs_teacher and teacher is None:
        raise ValueError(f"teacher: {preset} distils a trained {config.init} model; give --teacher RUN/model.safetensors")
    if teacher is not None and init is None and checks.starts_as(load(teacher)):
        init = teacher
    if config.init and init is None and teacher is None:
        raise ValueError(f"init: {preset} starts from a trained {config.init} model; give --init RUN/model.safetensors")
    execute(Request(config, data, out, init=init, teacher=teacher, download=download, **rest))


def distill(
    teacher: str, method: str, data: Path, out: Path, preset: str | None, changes: dict[str, Any], options: dict[str, Any],
    **rest: Any,
) -> None:  # fmt: skip
    """A few-step model from a diffusion model: consistency distillation, or easy consistency tuning of its weights."""
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not known; use one of {', '.join(METHODS)}")
    model = load(teacher)
    config = student(model, method, preset)
    config = changed(config, changes, options, False, rest.get("device"))
    checks.check_teacher(config, model)
    begins = checks.starts_as(model)
    if method == "ect" and not begins:
        raise ValueError(
            f"teacher: easy consistency tuning goes on with the weights of an EDM, this one is {model.prediction.kind!r} on "
            f"{type(model.schedule).__name__}; use --method cd, or an EDM such as mnist-edm"
        )
    if not begins:
        typer.echo("the student starts from scratch: the teacher's weights are for other inputs than a consistency model's")
    execute(
        Request(config, data, out, init=teacher if begins else None, teacher=teacher if method == "cd" else None, **rest)
    )


def student(teacher: Model, method: str, preset: str | None) -> TrainConfig:
    """The run that distils this teacher: of the preset, else of one with its network, else published settings."""
    if preset is not None:
        config = find_preset(preset)
        if config.loss != method:
            raise ValueError(
                f"preset: {preset} trains with the loss {config.loss!r}, not {method!r}; leave --preset or change --method"
            )
        return config
    if not isinstance(teacher.network, UNet):
        raise ValueError(f"teacher: its network is a {type(teacher.network).__name__}; name the student's with --preset")
    network = teacher.network.config
    for config in PRESETS.values():
        if config.loss == method and dataclasses.replace(config.network, dropout=network.dropout) == network:
            return config
    base = PRESETS[METHODS[method]]
    kind = "consistency" if method == "cd" else "edm"
    prediction = Prediction(kind, sigma_data=teacher.prediction.sigma_data)
    options = {} if method == "cd" else base.options
    return dataclasses.replace(base, network=network, prediction=prediction, options=options, images=4_000_000)


def resume(out: Path, data: Path | None, device: str | None) -> None:
    """Continue the run in a folder as it was asked for."""
    request = Request.load(out)
    if data is not None:
        request.data = data
    if device is not None:
        request.device = device
    execute(request)


def changed(
    config: TrainConfig, changes: dict[str, Any], options: dict[str, Any], unconditional: bool, device: str | None
) -> TrainConfig:
    """The config with what was given in place of its own values."""
    given = {k: v for k, v in changes.items() if v is not None}
    if "bf16" not in given:
        given["bf16"] = checks.has_bf16(checks.device_of(device))
    config = dataclasses.replace(config, **given)
    config = dataclasses.replace(config, options=config.options | options)
    if unconditional:
        config = dataclasses.replace(config, network=dataclasses.replace(config.network, labels=0))
    return config

"""The training objectives, one file per family, under one interface: `create(name, ...)` gives a `Loss`.

A new one is a dataclass derived from `Loss`, or from `Regression` where it is a law of t and a weight, and a line here.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastdiff.denoiser import Denoiser, Prediction
from fastdiff.schedules import Schedule
from fastdiff.training.losses.base import Batch, Draw, Loss
from fastdiff.training.losses.consistency import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ImprovedConsistencyTraining,
)
from fastdiff.training.losses.ddpm import DDPMLoss, MinSNRLoss
from fastdiff.training.losses.ect import ECTLoss
from fastdiff.training.losses.edm import EDMLoss
from fastdiff.training.losses.flow import FlowLoss
from fastdiff.training.losses.improved_ddpm import ImprovedDDPMLoss
from fastdiff.training.losses.ncsn import NCSNLoss
from fastdiff.training.losses.score_matching import ImplicitScoreMatching, SlicedScoreMatching
from fastdiff.training.losses.sde import SDELoss

__all__ = ["LOSSES", "Batch", "Draw", "Loss", "create", "options"]

LOSSES: dict[str, type[Loss]] = {
    "ddpm": DDPMLoss,
    "min-snr": MinSNRLoss,
    "iddpm": ImprovedDDPMLoss,
    "ncsn": NCSNLoss,
    "implicit": ImplicitScoreMatching,
    "sliced": SlicedScoreMatching,
    "sde": SDELoss,
    "edm": EDMLoss,
    "flow": FlowLoss,
    "cd": ConsistencyDistillation,
    "ct": ConsistencyTraining,
    "ict": ImprovedConsistencyTraining,
    "ect": ECTLoss,
}
_GIVEN = ("schedule", "prediction", "teacher", "perceptual")


def _named(name: str) -> type[Loss]:
    if name not in LOSSES:
        close = difflib.get_close_matches(name, LOSSES, 1, 0)[0]
        raise ValueError(f"loss: {name!r} is not known; did you mean {close}? There are {', '.join(LOSSES)}")
    return LOSSES[name]


def _check_kind(key: str, value: Any, default: Any) -> None:
    """ValueError where a value is not of its default's kind; a whole number serves as a float."""
    kinds = (int, float) if type(default) is float else (type(default),)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        what = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a word"}[type(default)]
        raise ValueError(f"options: {key} is {what}, such as its default {default!r}; got {value!r}")


def options(name: str) -> dict[str, Any]:
    """The options of a loss and their defaults, all plain JSON values."""
    return {f.name: f.default for f in dataclasses.fields(_named(name)) if f.name not in _GIVEN}


def create(
    name: str,
    schedule: Schedule,
    prediction: Prediction,
    given: Mapping[str, Any] | None = None,
    *,
    teacher: Denoiser | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Loss:
    """The loss `name` on this path with the options `given` and its defaults for the others.

    teacher: a frozen diffusion model, for the losses with `needs_teacher`; perceptual: (a, b) -> [B], of
    `fastdiff.training.perceptual`, for the metrics that name one.

    Raises: ValueError that names what is unknown, missing or does not fit.
    """
    kind, known, given = _named(name), options(name), dict(given or {})
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0)
            hint = f"did you mean {close[0]}? It has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"options: the loss {name!r} has no option {key!r}; {hint}")
        _check_kind(key, given[key], known[key])
    fields = {f.name for f in dataclasses.fields(kind)}
    if kind.needs_teacher and teacher is None:
        raise ValueError(f"teacher: the loss {name!r} distils a diffusion model; give one")
    if teacher is not None and not kind.needs_teacher:
        raise ValueError(f"teacher: the loss {name!r} has no use for one; leave it out")
    if perceptual is not None and "perceptual" not in fields:
        raise ValueError(f"perceptual: the loss {name!r} compares no images by one; leave it out")
    if kind.needs_teacher:
        given["teacher"] = teacher
    if "perceptual" in fields:
        given["perceptual"] = perceptual
    return kind(schedule=schedule, prediction=prediction, **given)

"""What the losses share: their interface, fused noising, and random numbers that depend on the sample's seed alone."""

import contextlib
import dataclasses
import enum
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.denoiser import Prediction
from fastdiff.schedules import Schedule


@dataclasses.dataclass
class Batch:
    """One training batch.

    x0: [B, C, H, W] in [-1, 1]; seeds: int64 [B], best on the host, where times are drawn from them; labels: [B] or None;
    progress: how much of the training is done, in [0, 1).
    """

    x0: Tensor
    seeds: Tensor
    labels: Tensor | None = None
    progress: float = 0.0


class Draw(enum.IntEnum):
    """What each draw of `ops.Domain.AUGMENT` is for: below 16 the losses', from there on the augmentations'."""

    TIME = 0
    PROJECTION = 1
    FIRST_AUGMENTATION = 16


@dataclasses.dataclass(kw_only=True)
class Loss:
    """A training objective: loss(network, batch) -> [B], one number per sample, which training averages.

    The fields of a subclass are its options. Whoever trains calls `start` once with the new network, `after_step` after
    every step of the optimiser, and keeps `state_dict` with its checkpoints. Both are given the bare network, a call may
    be given it wrapped or compiled. Everything random comes from the batch's seeds, but for the network's dropout.
    """

    schedule: Schedule
    prediction: Prediction

    family: ClassVar[str] = "diffusion"  # of the model that comes out: what its D is, see `Model`
    needs_teacher: ClassVar[bool] = False

    def __call__(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        raise NotImplementedError

    def start(self, network: nn.Module) -> None:
        """Before the first step, and before `load_state_dict`: make what belongs to this network."""

    def after_step(self, network: nn.Module, progress: float) -> None:
        """After the optimiser's step; progress is that of the batch (or batches) it saw."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides network and optimiser: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; after `start`."""


def normals(seeds: Tensor, draw: int = Draw.TIME) -> np.ndarray:
    """One standard normal per sample, float64 [B] on the host."""
    z = ops.philox_normal(seeds, draw, (1,), domain=ops.Domain.AUGMENT)
    return z[:, 0].double().cpu().numpy()


def uniforms(seeds: Tensor, draw: int = Draw.TIME) -> np.ndarray:
    """One uniform in (0, 1) per sample, float64 [B]: Phi of the normal."""
    return np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in normals(seeds, draw)])


def spread(values: np.ndarray, like: Tensor) -> Tensor:
    """Host values [B] as float32 on the device of `like`."""
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(like.device, torch.float32)


def column(values: np.ndarray, like: Tensor) -> Tensor:
    """Host values [B], numbers or booleans, as [B, 1, ...] to go with images [B, ...]."""
    there = torch.from_numpy(values).to(like.device) if values.dtype == bool else spread(values, like)
    return there.reshape(-1, *[1] * (like.dim() - 1))


def linear_forms(batch: Batch, *pairs: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """[len(pairs), B, C, H, W]: a x0 + b n for each pair of float64 [B] arrays, all with the same noise, in one pass."""
    table = np.stack([np.stack(np.broadcast_arrays(a, b), -1) for a, b in pairs], 1)
    return ops.add_noise(batch.x0, batch.seeds.to(batch.x0.device, non_blocking=True), spread(table, batch.x0))


def evaluate(
    network: Callable[..., Tensor], prediction: Prediction, x: Tensor, c_noise: np.ndarray, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """F, and the place of the log-variance where the network learns it, in float32, at the input x and c_noise [B]."""
    out = network(x, spread(c_noise, x), *([] if labels is None else [labels])).float()
    parts = 2 if prediction.learned_variance else 1
    if out.shape[1] != parts * x.shape[1]:
        raise ValueError(
            f"network: it returns {out.shape[1]} channels for images of {x.shape[1]}; with learned_variance="
            f"{prediction.learned_variance} give it out_channels={parts * x.shape[1]}"
        )
    return out[:, : x.shape[1]], out[:, x.shape[1] :] if parts == 2 else None


def regression_forms(schedule: Schedule, prediction: Prediction, t: np.ndarray) -> tuple[np.ndarray, list]:
    """c_noise, and the network's input and its target F* as pairs of coefficients on (x0, n), at times t [B]."""
    c = prediction.coefficients(schedule, t)
    return c.c_noise, [(c.c_in * schedule.alpha(t), c.c_in * schedule.sigma(t)), prediction.target(schedule, t)]


@dataclasses.dataclass(kw_only=True)
class Regression(Loss):
    """E_t w(t) mean over pixels of (F - F*)^2: a family is a law of t and a weight.

    F* is linear in (x0, n), so the network's input and its target are two forms of one fused pass.
    """

    def times(self, batch: Batch) -> np.ndarray:
        """t [B], in the schedule's own time."""
        raise NotImplementedError

    def weight(self, t: np.ndarray) -> np.ndarray:
        """w [B] on the squared error of F itself."""
        return np.ones_like(t)

    def __call__(self, network, batch):
        t = self.times(batch)
        c_noise, forms = regression_forms(self.schedule, self.prediction, t)
        net_in, target = linear_forms(batch, *forms)
        f, _ = evaluate(network, self.prediction, net_in, c_noise, batch.labels)
        return spread(self.weight(t), f) * (f - target).square().flatten(1).mean(1)

    def image_gain(self, t: np.ndarray) -> np.ndarray:
        """(D - x0)^2 / (F - F*)^2."""
        return self.prediction.coefficients(self.schedule, t).c_out ** 2

    def noise_gain(self, t: np.ndarray) -> np.ndarray:
        """Squared error of the noise (x - alpha D) / sigma, which is that of sigma times the score, over (F - F*)^2."""
        return self.image_gain(t) / self.schedule.ratio(t) ** 2


@contextlib.contextmanager
def same_dropout(x: Tensor) -> Iterator[None]:
    """Gives the generators back as they were, so that an evaluation in here and the next after it drop the same units."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        yield


def uniform_times(schedule: Schedule, batch: Batch) -> np.ndarray:
    """t uniform over a discrete schedule's steps, or over [t_min, t_max]."""
    u = uniforms(batch.seeds)
    if schedule.name == "ddpm":
        steps = schedule.t_max + 1
        return np.minimum(np.floor(u * steps), steps - 1)
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


def above(name: str, value: float, low: float, *, equal: bool = False) -> None:
    """ValueError where a number is not larger than `low`; `equal`: it may be that, too."""
    if not (value > low or (equal and value == low)):
        raise ValueError(f"{name}: {value} is out of range; use a number {'>=' if equal else '>'} {low}")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError where an option is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not known; use one of {', '.join(choices)}")

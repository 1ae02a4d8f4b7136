"""What a request for images means: its plan, seeds, labels, guidance and start, each checked once."""

import dataclasses
import inspect
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.model import Model
from fastdiff.plan import Plan
from fastdiff.samplers import SAMPLERS, adaptive, of_scheduler
from fastdiff.stepwise import Guidance

FRESH_SEEDS = 2**48  # a fresh run starts at a random seed below this, short enough to copy by hand
QUALITIES = {"lossless": torch.float32, "high": torch.bfloat16, "fast": torch.bfloat16}  # the network's type
COMPILE = ("auto", "off", "fast", "inductor")
NFE = 2  # where nothing is said
FEW, MANY = 4, 250  # below the one Euler or DDIM, from the other on a DDPM chain ancestral sampling


@dataclasses.dataclass(frozen=True)
class Guide:
    """Guidance D_u + weight (D - D_u): classifier-free, or autoguidance by a weaker model.

    weight: 1 changes nothing, more follows the labels more closely; one number or one for each image.
    model: the weaker model; by default the same one with the label that stands for none.
    interval: lowest and highest sigma / alpha where guidance applies (Kynkaanniemi et al. 2024).
    rescale: 0 ... 1, how much of D's standard deviation is set back to that of the unguided one (Lin et al. 2023).
    null_label: the label for none; by default the model's info["null_label"].
    """

    weight: float | Sequence[float]
    model: Model | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    null_label: int | None = None


def make_plan(model: Model, nfe: int | None = None, sampler: str = "auto", **options: Any) -> Plan:
    """The plan that `sample` executes: a sampler's, with what the model records for it: times for this nfe, statistics.

    "auto" is the scheduler of the diffusers pipeline that the model was read from, or else the choice of `automatic`. nfe is
    2 by default. The evaluations of "rk45" are counted, not planned: its plan has no rows, and nfe bounds them.
    """
    if sampler == "rk45":
        _known(options, sampler, list(inspect.signature(adaptive).parameters)[3:])
        return adaptive(model.schedule, model.prediction, nfe, **options)
    nfe = NFE if nfe is None else nfe
    if sampler == "auto" and isinstance(model.info.get("scheduler"), Mapping):
        return of_scheduler(model.schedule, model.prediction, nfe, model.info["scheduler"], **options)
    name = automatic(model, nfe) if sampler == "auto" else sampler
    if name not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} is not known; use auto, rk45 or one of {', '.join(SAMPLERS)}")
    allowed = SAMPLERS[name].options
    _known(options, name, allowed)
    if name == "consistency" and "times" not in options and nfe in model.times:
        options["times"] = model.times[nfe]
    for statistic in ("gamma", "mse"):
        if statistic in allowed and statistic in model.info:
            options.setdefault(statistic, model.info[statistic])
    if name == "ddpm" and model.prediction.learned_variance:
        options.setdefault("variance", "learned")
    return SAMPLERS[name](model.schedule, model.prediction, nfe, **options)


def _known(options: dict[str, Any], name: str, allowed: list[str]) -> None:
    for option in options:
        if option not in allowed:
            raise TypeError(f"{option}: sampler {name!r} has no such option; it has {', '.join(allowed)}")


def automatic(model: Model, nfe: int) -> str:
    """The sampler with the best published quality at nfe evaluations for the model's family.

    Consistency models have their own. UniPC leads at 4 to some 20 evaluations (3.87 FID on CIFAR-10 at 10); EDM's Heun
    beyond on other schedules than DDPM's (1.97 at 35), where it needs an odd number; DDPM's ancestral sampling at its full
    length (3.17 at 1000).
    """
    if model.family == "consistency" or not hasattr(nfe, "__index__"):
        return "consistency" if model.family == "consistency" else "euler"
    if model.schedule.name == "ddpm":
        return "ddim" if nfe < FEW else "unipc" if nfe < MANY else "ddpm"
    if nfe >= 21 and nfe % 2:
        return "heun"
    return "unipc" if nfe >= FEW else "heun" if nfe == 3 else "euler"


def check_seeds(seeds: Iterable[int] | None, n: int | None) -> list[int]:
    """The seeds as integers; fresh ones where none are given."""
    if seeds is None:
        count = 1 if n is None else n
        if isinstance(count, bool) or not hasattr(count, "__index__") or count < 1:
            raise ValueError(f"n: {n!r} images cannot be made; give an integer >= 1")
        first = secrets.randbelow(FRESH_SEEDS)
        return list(range(first, first + count))
    given: Any = seeds.tolist() if hasattr(seeds, "tolist") else seeds  # tensors and arrays
    listed: list[Any] = [given] if hasattr(given, "__index__") else list(given)
    if not listed:
        raise ValueError("seeds: the list is empty; give one integer per image, or leave seeds out and give n")
    if n is not None and n != len(listed):
        raise ValueError(f"n: {n} images asked for, but {len(listed)} seeds given; leave one of them out")
    for seed in listed:
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seeds: {seed!r} is no integer; give integers in 0 ... 2**64 - 1")
        if not 0 <= int(seed) < 2**64:
            raise ValueError(f"seeds: {int(seed)} is out of range; give integers in 0 ... 2**64 - 1")
    return [int(seed) for seed in listed]


def check_labels(labels, seeds: list[int], model: Model) -> list[int] | None:
    """A class for each image; by default its seed modulo the number of classes."""
    if not model.labels:
        if labels is not None:
            raise ValueError("labels: this model is unconditional; leave labels out")
        return None
    if labels is None:
        return [seed % model.labels for seed in seeds]
    listed: Any = labels.tolist() if hasattr(labels, "tolist") else labels  # tensors and arrays
    listed = [listed] * len(seeds) if hasattr(listed, "__index__") else list(listed)
    if len(listed) == 1:
        listed = listed * len(seeds)
    if len(listed) != len(seeds):
        raise ValueError(f"labels: {len(listed)} given for {len(seeds)} images; give one for all or one for each")
    for label in listed:
        if isinstance(label, bool) or not hasattr(label, "__index__") or not 0 <= int(label) < model.labels:
            raise ValueError(f"labels: {label!r} is out of range; this model has classes 0 ... {model.labels - 1}")
    return [int(label) for label in listed]


def check_quality(quality: str) -> None:
    if quality not in QUALITIES:
        raise ValueError(f"quality: {quality!r} is not known; use one of {', '.join(QUALITIES)}")


def check_compile(compile: str) -> None:
    if compile not in COMPILE:
        raise ValueError(f"compile: {compile!r} is not known; use one of {', '.join(COMPILE)}")


def check_batch_size(batch_size: int | None, device: torch.device) -> int:
    if batch_size is None:
        return 64 if device.type == "cpu" else 256
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} is no size; give an integer >= 1")
    return int(batch_size)


def check_guidance(guidance: float | Guide | None, model: Model, n: int) -> tuple[Guide, Tensor, int | None] | None:
    """The guide, its weights [1] or [n], and the label for none where it needs one."""
    if guidance is None:
        return None
    guide = guidance if isinstance(guidance, Guide) else Guide(guidance)
    weight = torch.as_tensor(guide.weight, dtype=torch.float64).reshape(-1)
    if len(weight) not in (1, n) or not torch.isfinite(weight).all():
        raise ValueError(f"guidance: weights {guide.weight}; give one finite number, or one for each of the {n} images")
    if not 0 <= guide.rescale <= 1:
        raise ValueError(f"guidance: rescale {guide.rescale} is out of range; use 0 ... 1")
    if guide.interval is not None and not 0 <= guide.interval[0] < guide.interval[1]:
        raise ValueError(f"guidance: interval {guide.interval}; give 0 <= lowest < highest sigma / alpha")
    if guide.model is not None:
        _check_weaker(guide.model, model)
        return guide, weight, None
    if not model.labels:
        raise ValueError(
            "guidance: this model is unconditional; give a weaker one, Guide(weight, model=...), or leave it out"
        )
    null = model.info.get("null_label") if guide.null_label is None else guide.null_label
    if null is None:
        raise ValueError("guidance: the model does not say which label stands for none; give Guide(weight, null_label=...)")
    return guide, weight, int(null)


def _check_weaker(other: Model, model: Model) -> None:
    same = (other.schedule, other.prediction, other.labels) == (model.schedule, model.prediction, model.labels)
    if not same:
        raise ValueError("guidance: the weaker model's schedule, prediction or number of classes differs from the model's")


def guidance_of(
    checked: tuple[Guide, Tensor, int | None] | None,
    part: slice,
    labels: Tensor | None,
    network: Callable[..., Tensor] | None,
) -> Guidance | None:
    """A batch's share of the guidance."""
    if checked is None:
        return None
    guide, weight, null = checked
    without = torch.full_like(labels, null) if labels is not None and null is not None else None
    return Guidance(weight if len(weight) == 1 else weight[part], without, network, guide.interval)


def check_images(given, shape: tuple[int, int, int], n: int, name: str = "start") -> Tensor | None:
    """Images as [n, C, H, W]; one serves for all."""
    if given is None:
        return None
    images = torch.as_tensor(given)
    images = images.expand(n, *shape) if images.shape == shape else images
    if tuple(images.shape) != (n, *shape):
        raise ValueError(f"{name}: expected {(n, *shape)} or {shape}, got {tuple(images.shape)}")
    return images


def check_mask(mask, known: Tensor | None, shape: tuple[int, int, int], n: int) -> Tensor | None:
    """The mask as [n, C, H, W], one for all channels or images expanded."""
    if (mask is None) != (known is None):
        raise ValueError("known, mask: an image whose pixels are known and the mask that says which come together")
    if mask is None:
        return None
    weights, (c, h, w) = torch.as_tensor(mask).float(), shape
    if tuple(weights.shape) not in ((h, w), (1, h, w), (c, h, w), (n, 1, h, w), (n, c, h, w)):
        raise ValueError(
            f"mask: {tuple(weights.shape)} does not fit; use {(h, w)}, {shape}, {(n, 1, h, w)} or {(n, *shape)}"
        )
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError("mask: expected values from 0 (make this pixel) to 1 (keep it); divide by its largest value")
    return weights.expand(n, c, h, w)


def check_noise(noise, plan: Plan, shape: tuple[int, int, int], n: int) -> list[Tensor] | None:
    """[x_T, z_1, ...], each [n, C, H, W]: the start and every draw of the plan."""
    if noise is None:
        return None
    listed = [torch.as_tensor(z) for z in noise]
    if len(listed) < 1 + plan.draws:
        raise ValueError(
            f"noise: {plan.name} uses the start and {plan.draws} draws, {len(listed)} arrays given; give {1 + plan.draws}"
        )
    for k, z in enumerate(listed):
        if tuple(z.shape) != (n, *shape):
            raise ValueError(f"noise: entry {k} has shape {tuple(z.shape)}, expected {(n, *shape)}")
    return listed

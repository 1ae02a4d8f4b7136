"""sample(): the front door. Checks the request once, asks a sampler for its plan and runs it batch by batch."""

import contextlib
import copy
import dataclasses
import inspect
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import ops
from fastdiff.model import Model, load, packaged
from fastdiff.plan import Plan, execute
from fastdiff.samplers import SAMPLERS

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
FRESH_SEEDS = 2**48  # a fresh run starts at a random seed below this, short enough to copy by hand


@dataclasses.dataclass
class Samples:
    """Images and everything needed to make them again."""

    images: Tensor  # float32 [n, C, H, W]
    seeds: list[int]
    labels: list[int] | None
    plan: Plan
    model: Model
    evaluations: int  # network calls counted in each batch
    seconds: float  # wall time, model loading left out
    device: torch.device
    dtype: torch.dtype


def sample(
    model: Model | str | os.PathLike | None = None,
    nfe: int = 2,
    *,
    n: int | None = None,
    seeds: Iterable[int] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    sampler: str = "auto",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
    clip_output: bool = True,
    **options: Any,
) -> Tensor:
    """Images from a diffusion or consistency model in `nfe` network evaluations.

    Args:
        model: None for the packaged MNIST digits; a packaged name, a path, a `Model`, or what `fastdiff.wrap` returns.
        nfe: number of network evaluations, >= 1.
        n: how many images, from fresh seeds (printed to stderr); 1 where seeds are not given either.
        seeds: one integer in 0 ... 2^64 - 1 per image. An image depends on its own seed alone, not on the batch.
        labels: class of each image or one for all; by default seed modulo the number of classes.
        sampler: "auto" or one of `fastdiff.samplers.SAMPLERS`; options are passed to it (times=, eta=, S_churn=, ...).
        batch_size: images per network call; 64 on a CPU, 256 on a GPU by default.
        device: where to compute; by default where the model is, and the GPU, where there is one, for a path.
        dtype: what the network computes in: float32 (default), bfloat16, float16. The sampler's state is float32.
        progress: show a bar; by default on a terminal when it takes more than a moment.
        clip_output: clamp the result to [-1, 1].

    Returns: float32 [n, C, H, W] in [-1, 1], on the CPU.

    Raises: TypeError, ValueError naming argument, value and remedy; FloatingPointError where the network gave NaN.
    """
    result = run(
        model,
        nfe,
        n=n,
        seeds=seeds,
        labels=labels,
        sampler=sampler,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
        clip_output=clip_output,
        **options,
    )
    if seeds is None:
        print(f"fastdiff: seeds {result.seeds[0]} ... {result.seeds[-1]}", file=sys.stderr)
    return result.images


def run(
    model: Model | str | os.PathLike | None = None,
    nfe: int = 2,
    *,
    n: int | None = None,
    seeds: Iterable[int] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    sampler: str = "auto",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
    clip_output: bool = True,
    **options: Any,
) -> Samples:
    """`sample` with its provenance: arguments as there."""
    if "generator" in options:
        raise TypeError("generator: noise belongs to the sample here; pass seeds=[...], one integer per image, instead")
    model, target = _resolve(model, nfe, device)
    if model.shape is None:
        raise ValueError("model: its image shape is not known; give it: fastdiff.wrap(net, ..., shape=(C, H, W))")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not supported here; use torch.float32, torch.bfloat16 or torch.float16")
    plan = make_plan(model, nfe, sampler, **options)
    seed_list = _seeds(seeds, n)
    label_list = _labels(labels, seed_list, model)
    size = _batch_size(batch_size, target)
    placed = _on_device(model, target)
    network, counter = _counted(placed)
    start = time.perf_counter()
    images = []
    with torch.inference_mode(), _evaluating(placed), _autocast(target, dtype):
        for first in _bar(range(0, len(seed_list), size), progress, plan, len(seed_list)):
            part = slice(first, first + size)
            batch_labels = None if label_list is None else torch.tensor(label_list[part], device=target)
            batch_seeds = ops.seed_tensor(seed_list[part], target)
            counter[0] = 0
            x = execute(plan, network, batch_seeds, model.shape, batch_labels, dtype=dtype)
            images.append(x)
        result = torch.cat(images)
        _check_finite(result, model)
        result = (result.clamp_(-1, 1) if clip_output else result).cpu()
    seconds = time.perf_counter() - start
    return Samples(result.clone(), seed_list, label_list, plan, model, counter[0], seconds, target, dtype)


def make_plan(model: Model, nfe: int, sampler: str = "auto", **options: Any) -> Plan:
    """The plan that `sample` executes: a sampler's, with the model's recorded times for this nfe where it has some."""
    name = _automatic(model, nfe) if sampler == "auto" else sampler
    if name not in SAMPLERS:
        raise ValueError(f"sampler: {sampler!r} is not known; use auto or one of {', '.join(SAMPLERS)}")
    make = SAMPLERS[name]
    allowed = list(inspect.signature(make).parameters)[3:]
    for option in options:
        if option not in allowed:
            raise TypeError(f"{option}: sampler {name!r} has no such option; it has {', '.join(allowed)}")
    if name == "consistency" and "times" not in options and nfe in model.times:
        options["times"] = model.times[nfe]
    return make(model.schedule, model.prediction, nfe, **options)


def _automatic(model: Model, nfe: int) -> str:
    if model.family == "consistency":
        return "consistency"
    if model.schedule.name == "ddpm":
        return "ddim" if hasattr(nfe, "__index__") and nfe < 250 else "ddpm"
    return "heun" if hasattr(nfe, "__index__") and nfe >= 3 and nfe % 2 else "euler"


def _resolve(model, nfe: int, device) -> tuple[Model, torch.device]:
    """The model and the device to compute on."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, but this machine has no usable CUDA GPU; use device='cpu'")
    if isinstance(model, Model):
        return model, torch.device(device) if device is not None else model.device
    default = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device) if device is not None else torch.device(default)
    return load(packaged(nfe if hasattr(nfe, "__index__") else None) if model is None else model, target), target


def _on_device(model: Model, device: torch.device) -> Callable[..., Tensor]:
    """The model's network on `device`; the caller's own stays where it is."""
    network = model.network
    if isinstance(network, nn.Module) and model.device != device:
        network = copy.deepcopy(network).to(device)
    return network


def _seeds(seeds: Iterable[int] | None, n: int | None) -> list[int]:
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


def _labels(labels, seeds: list[int], model: Model) -> list[int] | None:
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


def _batch_size(batch_size: int | None, device: torch.device) -> int:
    if batch_size is None:
        return 64 if device.type == "cpu" else 256
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r} is no size; give an integer >= 1")
    return int(batch_size)


def _counted(network: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """The network, and a cell that counts its calls."""
    calls = [0]

    def call(*args):
        calls[0] += 1
        return network(*args)

    return call, calls


@contextlib.contextmanager
def _evaluating(network):
    """Every submodule in eval mode, and back to what it was."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    training = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, was in zip(modules, training, strict=True):
            m.training = was


def _autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32)


def _bar(batches: range, progress: bool | None, plan: Plan, n: int):
    show = progress if progress is not None else sys.stderr.isatty() and n * plan.nfe > 1000
    return tqdm(batches, unit="batch", disable=not show, desc=plan.name)


def _check_finite(images: Tensor, model: Model) -> None:
    bad = int((~torch.isfinite(images)).sum())
    if not bad:
        return
    weights = [k for k, v in model.state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    cause = (
        f"its weights {', '.join(weights[:3])} are not finite: load an earlier checkpoint"
        if weights
        else "its weights are finite: try dtype=torch.float32, and check that schedule and prediction fit the network"
    )
    raise FloatingPointError(f"model: {bad} of {images.numel()} pixels came out NaN or infinite; {cause}")

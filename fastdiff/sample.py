"""sample(): the front door. Checks the request once, asks a sampler for its plan and runs it batch by batch."""

import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff import held, invariant, ops
from fastdiff.compile import Compiled
from fastdiff.compile.automatic import Engine, engine
from fastdiff.flags import evaluating, exact
from fastdiff.model import Model, packaged
from fastdiff.plan import Plan
from fastdiff.request import (
    MANY,
    QUALITIES,
    Guide,
    check_batch_size,
    check_compile,
    check_guidance,
    check_images,
    check_labels,
    check_mask,
    check_noise,
    check_quality,
    check_seeds,
    guidance_of,
    make_plan,
)
from fastdiff.samplers import Adaptive
from fastdiff.samplers.adjust import adjustment, keep

DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


@dataclasses.dataclass
class Samples:
    """Images and everything needed to make them again."""

    images: Tensor  # float32 [n, C, H, W], float64 where dtype is
    seeds: list[int]
    labels: list[int] | None
    plan: Plan
    model: Model
    evaluations: int  # network calls counted in each batch; for rk45 the most of an image
    seconds: float  # wall time, model loading left out
    device: torch.device
    dtype: torch.dtype
    engine: str  # what computed the network: "fast", "inductor" or "network", and why
    trajectory: Tensor | None = None  # [rows, n, C, H, W], the state after each row, where it was asked for


def sample(
    model: Model | str | os.PathLike | None = None,
    nfe: int | None = None,
    *,
    n: int | None = None,
    seeds: Iterable[int] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    sampler: str = "auto",
    guidance: float | Guide | None = None,
    threshold: float | None = None,
    start: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    quality: str = "lossless",
    compile: str = "auto",
    progress: bool | None = None,
    clip_output: bool = True,
    callback: Callable[[int, Tensor], None] | None = None,
    deterministic: bool = False,
    **options: Any,
) -> Tensor:
    """Images from a diffusion or consistency model in `nfe` network evaluations.

    Args:
        model: None for the packaged MNIST digits; a packaged name, a path, a `Model`, what `fastdiff.wrap` returns, or a
            diffusers pipeline.
        nfe: number of network evaluations, >= 1; 2 by default. "rk45" counts them: the most an image may take.
        n: how many images, from fresh seeds (printed to stderr); 1 where seeds are not given either.
        seeds: one integer in 0 ... 2^64 - 1 per image. An image depends on its own seed alone, not on the batch.
        labels: class of each image or one for all; by default seed modulo the number of classes.
        sampler: "auto", "rk45" or one of `fastdiff.samplers.SAMPLERS`; options are passed to it (times=, eta=, rtol=, ...).
            "auto" is a diffusers pipeline's own scheduler, see `fastdiff.samplers.of_scheduler`.
        guidance: weight of classifier-free guidance, 1 for none; or a `Guide`: interval, rescale, a weaker model.
        threshold: dynamic thresholding's quantile, such as 0.995, applied to each estimate of the image.
        start: images [n, C, H, W] or [C, H, W] in [-1, 1] to noise and start from; the level is the sampler's t_start=.
        known, mask: images like start, and where to keep them: 1 in the mask's pixels, 0 where pixels are to be made.
            [H, W], [C, H, W], [n, 1, H, W] or [n, C, H, W]; see `fastdiff.samplers.adjust.keep`.
        noise: [x_T, z_1, ...], unit noise [n, C, H, W] for the start and every draw, in place of the seeds'.
        batch_size: images per network call; 64 on a CPU, 256 on a GPU by default.
        device: where to compute; by default where the model is, and the GPU, where there is one, for a path.
        dtype: what the network computes in: float32 (default), bfloat16, float16 with a float32 state of the sampler;
            float64 for both.
        quality: "lossless": as dtype says, float32 without TF32. "high": bfloat16 with float32 sums, error at most twice
            that of a plain bfloat16 network. "fast": on GPUs of compute capability 8.9 and later a program with 3x3
            convolutions of eight bits, with some ten times bfloat16's error; elsewhere "high", as `run(...).engine` says.
        compile: how a `fastdiff.UNet` is computed. "auto": by a program of `fastdiff.compile` where this call's images pay
            for making it, the network is small or it is there already, kept with the model; "fast": by such a program in any
            case; "off": the network as it is, which starts at once; "inductor": by torch.compile(fullgraph=True). They
            agree to rounding.
        progress: show a bar; by default on a terminal when it takes more than a moment.
        clip_output: clamp the result to [-1, 1].
        callback: callback(row, x) after each row of the plan; x is the sampler's own state, not a copy.
        deterministic: the same bits for an image in every batch, on CPUs; one image at a time where the network needs it.

    Returns: float32 (float64 with dtype=torch.float64) [n, C, H, W] in [-1, 1], on the CPU.

    Raises: TypeError, ValueError naming argument, value and remedy; FloatingPointError where the network gave NaN.
    """
    given = {k: v for k, v in locals().items() if k not in ("model", "nfe", "options")}
    result = run(model, nfe, **given, **options)
    if seeds is None:
        print(f"fastdiff: seeds {result.seeds[0]} ... {result.seeds[-1]}", file=sys.stderr)
    return result.images


def run(
    model: Model | str | os.PathLike | None = None,
    nfe: int | None = None,
    *,
    n: int | None = None,
    seeds: Iterable[int] | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    sampler: str = "auto",
    guidance: float | Guide | None = None,
    threshold: float | None = None,
    start: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    noise: Sequence[Tensor] | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    quality: str = "lossless",
    compile: str = "auto",
    progress: bool | None = None,
    clip_output: bool = True,
    callback: Callable[[int, Tensor], None] | None = None,
    deterministic: bool = False,
    trajectory: bool = False,
    **options: Any,
) -> Samples:
    """`sample` with its provenance: arguments as there. trajectory: keep the state after every row, too."""
    if "generator" in options:
        raise TypeError("generator: noise belongs to the sample here; pass seeds=[...], one integer per image, instead")
    model, target = _resolve(model, MANY if sampler == "rk45" else nfe, device)
    if model.shape is None:
        raise ValueError("model: its image shape is not known; give it: fastdiff.wrap(net, ..., shape=(C, H, W))")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} is not supported here; use torch.float32, float64, bfloat16 or float16")
    if (start is not None) != ("t_start" in options):
        raise ValueError("start, t_start: the images to start from and the time their noise belongs to come together")
    plan = make_plan(model, nfe, sampler, **options)
    if isinstance(plan, Adaptive) and (trajectory or callback is not None or mask is not None):
        raise ValueError(
            "callback, trajectory, mask: rk45 takes other steps for each image; use a sampler with rows, heun say"
        )
    invariant.check(deterministic, target)
    _check_range(model, plan, start is not None or known is not None or threshold is not None)
    if n is None and noise is not None and seeds is None:
        seeds = range(len(noise[0]))
    seed_list = check_seeds(seeds, n)
    label_list = check_labels(labels, seed_list, model)
    guide = check_guidance(guidance, model, len(seed_list))
    images = check_images(start, model.shape, len(seed_list))
    keep_what = check_images(known, model.shape, len(seed_list), "known")
    keep_where = check_mask(mask, keep_what, model.shape, len(seed_list))
    draws = check_noise(noise, plan, model.shape, len(seed_list))
    size = check_batch_size(batch_size, target)
    check_quality(quality)
    check_compile(compile)
    compile = "off" if deterministic and compile == "auto" else compile  # programs choose their algorithms by the clock
    dtype = QUALITIES[quality] if dtype == torch.float32 else dtype
    placed = _placed(model, target, dtype)
    calls = len(seed_list) * (plan.nfe or MANY)  # rk45 counts its evaluations afterwards
    by = engine(model, placed, dtype, compile, calls, quality)
    weaker, weaker_by = None, None
    if guide and guide[0].model:
        weaker = _placed(guide[0].model, target, dtype)
        weaker_by = engine(guide[0].model, weaker, dtype, compile, calls, quality)
    network, counter = _counted(invariant.Invariant(by.call) if deterministic else by.call)
    begin = time.perf_counter()
    results: list[Tensor] = []
    states: list[list[Tensor]] = []

    def on_row(i: int, x: Tensor) -> None:
        if trajectory:
            states[-1].append(x.cpu().clone())
        if callback is not None:
            _check_state(plan, i, x)
            callback(i, x)

    modules = [network for network, used in ((placed, by), (weaker, weaker_by)) if used and used.name != "fast"]
    with torch.inference_mode(), evaluating(*modules), _autocast(target, dtype), exact(quality):
        for first in _bar(range(0, len(seed_list), size), progress, plan, len(seed_list)):
            part = slice(first, first + size)
            batch_labels = None if label_list is None else torch.tensor(label_list[part], device=target)
            counter[0] = 0
            states.append([])
            kept_here = [None if v is None else v[part].to(target) for v in (keep_what, keep_where)]
            x = by.execute(
                plan,
                network,
                ops.seed_tensor(seed_list[part], target),
                model.shape,
                batch_labels,
                dtype=_input_type(by, dtype),
                x_T=None if draws is None else draws[0][part],
                noise=None if draws is None else [z[part] for z in draws[1:]],
                start=None if images is None else images[part].to(target),
                guidance=guidance_of(guide, part, batch_labels, weaker_by.call if weaker_by else None),
                adjust=adjustment(threshold, guide[0].rescale if guide else 0.0, *kept_here),
                on_row=on_row if trajectory or callback is not None else None,
            )
            results.append(x if mask is None else keep(x, *(v.to(x) for v in kept_here if v is not None)))
        result = torch.cat(results)
        _check_finite(result, model)
        result = 2 * result - 1 if model.convention.unit_images else result
        result = (result.clamp_(-1, 1) if clip_output else result).cpu()
    seconds = time.perf_counter() - begin
    kept = torch.stack([torch.cat(rows) for rows in zip(*states, strict=True)]).clone() if trajectory else None
    evaluations = plan.nfe if by.captured or isinstance(plan, Adaptive) else counter[0]
    how = (evaluations, seconds, target, dtype, by.describe())
    return Samples(result.clone(), seed_list, label_list, plan, model, *how, kept)


def _check_range(model: Model, plan: Plan, images: bool) -> None:
    """What takes images for numbers in [-1, 1] is not for a network that knows them in [0, 1]."""
    clips = any(row.d_clip for row in plan.rows)
    if model.convention.unit_images and (clips or images):
        raise ValueError(
            "start, known, clip, threshold: this network's images lie in [0, 1], where these are not defined; leave them out"
        )


def _check_state(plan: Plan, i: int, x: Tensor) -> None:
    """The step-wise loop can say where it was that the network gave NaN."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        row = plan.rows[i]
        raise FloatingPointError(
            f"model: {bad} of {x.numel()} pixels ({bad / x.numel():.1%}) are NaN or infinite after row {i + 1} of "
            f"{len(plan.rows)}, t = {row.t:.6g}"
        )


def _resolve(model, nfe: int | None, device) -> tuple[Model, torch.device]:
    """The model and the device to compute on."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, but this machine has no usable CUDA GPU; use device='cpu'")
    if isinstance(model, Model):
        return model, torch.device(device) if device is not None else model.device
    default = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device) if device is not None else torch.device(default)
    return held.read(packaged(nfe if hasattr(nfe, "__index__") else None) if model is None else model, target), target


def _placed(model: Model, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The model's network on `device`, in float64 where that is asked for; the caller's own stays as it is."""
    network = model.network
    if isinstance(model, Compiled) and model.device != device:
        raise ValueError(f"model: it was compiled on {model.device}; compile it on {device}, or sample on {model.device}")
    if not isinstance(network, nn.Module):
        return network
    double = dtype == torch.float64 and any(p.dtype != dtype for p in network.parameters())
    if model.device != device or double:
        network = copy.deepcopy(network).to(device)
    return network.double() if double else network


def _counted(network: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """The network, and a cell that counts its calls."""
    calls = [0]

    def call(*args):
        calls[0] += 1
        return network(*args)

    return call, calls


def _input_type(by: Engine, dtype: torch.dtype) -> torch.dtype:
    """That of the network's input: a program rounds for itself, and then the state's own serves."""
    return torch.float32 if by.name == "fast" and dtype == torch.bfloat16 else dtype


def _autocast(device: torch.device, dtype: torch.dtype):
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if low else torch.bfloat16, enabled=low)


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

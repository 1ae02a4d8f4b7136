"""What can be known to fail is refused before the first step."""

import torch

from fastdiff.model import Model
from fastdiff.schedules import EDM, VE
from fastdiff.training import augment
from fastdiff.training.config import OPTIMIZERS, TrainConfig
from fastdiff.training.data import ImageData
from fastdiff.unet import UNet


def check_config(config: TrainConfig, world: int = 1) -> None:
    """Numbers in range, and parts of the batch that are equal."""
    for name in ("images", "batch", "accumulate", "lr"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)} makes no training; give a number > 0")
    if config.batch % (world * config.accumulate):
        raise ValueError(
            f"batch: {config.batch} images cannot be shared by {world} processes in {config.accumulate} parts each; "
            f"give a multiple of {world * config.accumulate}"
        )
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: {config.optimizer!r} is not known; use one of {', '.join(OPTIMIZERS)}")
    if not 0 <= config.seed < 2**23:
        raise ValueError(f"seed: {config.seed} is out of range; give 0 ... {2**23 - 1}")
    if not config.ema or min(config.ema) <= 0:
        raise ValueError(f"ema: {config.ema} are no half-lives; give one or more numbers of images > 0")
    if config.clip < 0 or not 0 <= config.augment <= 1:
        raise ValueError(f"clip, augment: {config.clip}, {config.augment}; give a norm >= 0 and a probability in [0, 1]")
    if config.augment and config.network.augment != augment.LABELS:
        raise ValueError(
            f"augment: the network is told of augmentations by {augment.LABELS} numbers, it takes {config.network.augment}; "
            f"set UNetConfig.augment={augment.LABELS}, or --augment 0"
        )
    outs = config.network.in_channels * (2 if config.prediction.learned_variance else 1)
    if config.network.out_channels != outs:
        raise ValueError(f"network: it returns {config.network.out_channels} channels, the prediction wants {outs}")


def check_data(config: TrainConfig, data: ImageData) -> None:
    """The images are those that the network takes, and their labels are there."""
    network, (c, h, w) = config.network, data.shape
    halvings = len(network.multipliers) - 1
    if h % 2**halvings or w % 2**halvings or min(h, w) < 2**halvings:
        raise ValueError(
            f"data: images of {w} x {h} pixels cannot be halved {halvings} times, as this network does; "
            f"use a multiple of {2**halvings} (--image-size) or a preset with fewer levels"
        )
    if (c, h, w) != (network.in_channels, network.resolution, network.resolution):
        raise ValueError(
            f"data: its images are {c} x {h} x {w}, the network is made for {network.in_channels} x {network.resolution} x "
            f"{network.resolution}; choose another preset, or --image-size {network.resolution} for a folder or zip"
        )
    if network.labels and data.labels is None:
        raise ValueError(
            f"labels: the network takes {network.labels} classes, the data has no labels (one sub-folder for each class); "
            f"add them, or train without: --unconditional"
        )
    if network.labels and data.classes > network.labels:
        raise ValueError(
            f"labels: the data has {data.classes} classes, the network takes {network.labels}; give --unconditional or a "
            f"preset for as many"
        )


def check_init(config: TrainConfig, init: Model) -> None:
    """Weights to start from are those of the same architecture."""
    if not isinstance(init.network, UNet):
        raise ValueError(
            f"init: its network is a {type(init.network).__name__}; only one of fastdiff's UNet can be trained on"
        )
    a, b = init.network.config.describe(), config.network.describe()
    # Dropout has no weights.
    other = [f"{k}: {a.get(k)} there, {b.get(k)} here" for k in {**a, **b} if a.get(k) != b.get(k) and k != "dropout"]
    if other:
        raise ValueError(
            f"init: its network is not the one to be trained ({'; '.join(sorted(other))}); "
            f"use a checkpoint of the same architecture"
        )


def check_teacher(config: TrainConfig, teacher: Model) -> None:
    """Teacher and student make the same images from the same labels, and the teacher is a diffusion model."""
    network = config.network
    if teacher.family != "diffusion":
        raise ValueError(f"teacher: it is a {teacher.family} model; distillation needs a diffusion model such as mnist-edm")
    shape = (network.in_channels, network.resolution, network.resolution)
    if teacher.shape is not None and tuple(teacher.shape) != shape:
        raise ValueError(f"teacher: it makes images {tuple(teacher.shape)}, the student {shape}; they must be the same")
    if teacher.labels != network.labels:
        raise ValueError(
            f"teacher: it knows {teacher.labels} classes, the student {network.labels}; give a teacher trained alike, or a "
            f"student with as many"
        )
    if teacher.prediction.learned_variance:
        raise ValueError("teacher: a network that learns its variance is no denoiser for distillation; give one without")


def starts_as(teacher: Model) -> bool:
    """True where a consistency network may begin with the teacher's weights: same input, same level, same output."""
    edm = isinstance(teacher.schedule, EDM) and not isinstance(teacher.schedule, VE)
    return isinstance(teacher.network, UNet) and edm and teacher.prediction.kind == "edm" and not teacher.prediction.raw


def bytes_of_files(config: TrainConfig, parameters: int, keep: int) -> int:
    """What a run writes at most: states (weights, two moments, averages, a target network) and models, one of each twice."""
    states = (keep + 1) * (4 + len(config.ema)) * 4 * parameters
    return states + 2 * (len(config.ema) + 1) * 4 * parameters


def device_of(name: str | None) -> torch.device:
    """The device asked for, or the best one here."""
    if name is not None and torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} was asked for, but this machine has no usable CUDA GPU; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products are native: GPUs from sm_80, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()

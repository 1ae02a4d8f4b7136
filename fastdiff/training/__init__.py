"""Training: losses (one file per family), the trainer, its data and its presets."""

from fastdiff.training.config import TrainConfig
from fastdiff.training.data import ImageData
from fastdiff.training.datasets import load_cifar10, load_images
from fastdiff.training.mnist import load_mnist
from fastdiff.training.presets import PRESETS, find_preset
from fastdiff.training.trainer import Trainer, TrainingError

__all__ = [
    "PRESETS",
    "ImageData",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "find_preset",
    "load_cifar10",
    "load_images",
    "load_mnist",
]

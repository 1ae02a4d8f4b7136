"""Training: losses (one file per family), the trainer, its data and its presets."""

from fastdiff.training.config import PRESETS, TrainConfig
from fastdiff.training.data import ImageData
from fastdiff.training.datasets import load_images
from fastdiff.training.mnist import load_mnist
from fastdiff.training.trainer import Trainer

__all__ = ["PRESETS", "ImageData", "TrainConfig", "Trainer", "load_images", "load_mnist"]

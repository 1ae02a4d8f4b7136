"""A tiny data set in MNIST's own file format and a network that learns it in seconds."""

import dataclasses
import gzip
import struct

import numpy as np
import pytest
import torch
from tiny import tiny

from fastdiff import Prediction, schedules
from fastdiff.training import ImageData, TrainConfig

NETWORK = tiny(dropout=0.2, labels=2)


def write_idx(path, array):
    """MNIST's format: two zero bytes, type 8 (bytes), dimensions, sizes as big-endian words, data."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(head + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory):
    """48 training and 8 test images of 28 x 28 in the four original files."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for name, n in (("train", 48), ("t10k", 8)):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return folder


@pytest.fixture
def toy_data():
    """Two Gaussian blobs of 8 x 8 pixels: class 0 dark, class 1 bright."""
    rng = np.random.default_rng(1)
    labels = np.arange(64) % 2
    images = rng.normal(60 + 130 * labels[:, None, None, None], 12, (64, 1, 8, 8)).clip(0, 255)
    return ImageData(torch.from_numpy(images).byte(), torch.from_numpy(labels))


@pytest.fixture
def toy_config():
    """make(loss, **changes) -> TrainConfig of a run of a few steps."""

    def make(loss="edm", **changes):
        ddpm = loss == "ddpm"
        base = TrainConfig(
            loss,
            NETWORK,
            schedules.DDPM() if ddpm else schedules.EDM(),
            Prediction("eps" if ddpm else "edm"),
            images=128,
            batch=16,
            lr=2e-3,
            warmup=64,
            bf16=False,
        )
        return dataclasses.replace(base, **changes)

    return make

"""MNIST's own four files, packed or not, or as torchvision lays them out."""

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.training.data import ImageData

NAMES = {True: "train", False: "t10k"}
PUBLISHED = {  # MD5 of the unpacked files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def mnist_folder(folder: Path) -> Path | None:
    """Where MNIST's files lie: `folder`/MNIST/raw, `folder`/raw or `folder` itself; None without any."""
    for base in (folder / "MNIST" / "raw", folder / "raw", folder):
        if any((base / (name + end)).is_file() for name in PUBLISHED for end in ("", ".gz")):
            return base
    return None


def load_mnist(folder: str | Path, train: bool = True, download: bool = False, seed: int = 0) -> ImageData:
    """MNIST through torchvision's readers, from `folder`/MNIST/raw, `folder`/raw or the four original files in `folder`.

    `about["checksums"]` says whether the files are the published ones; other data in MNIST's format is read as well, under
    the folder's name. Nothing is downloaded unless `download` asks for it.

    Raises: FileNotFoundError that says what is missing; ValueError naming the file that is damaged.
    """
    folder = Path(folder)
    if download:
        from torchvision.datasets import MNIST

        MNIST(folder, train=train, download=True)
    base = mnist_folder(folder) or folder
    first = base / f"{NAMES[train]}-images-idx3-ubyte"
    if not first.is_file() and not first.with_name(first.name + ".gz").is_file():
        raise FileNotFoundError(
            f"data: no MNIST in {folder}; it needs {first.name} (.gz or not) and the labels beside it, or MNIST/raw as "
            f"torchvision lays it out. --download fetches it there"
        )
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images, known_images = _read(base, f"{NAMES[train]}-images-idx3-ubyte", read_image_file)
    labels, known_labels = _read(base, f"{NAMES[train]}-labels-idx1-ubyte", read_label_file)
    if len(images) != len(labels):
        raise ValueError(f"data: {base} has {len(images)} {NAMES[train]}-images but {len(labels)} labels; copy both again")
    published = known_images and known_labels
    about = {
        "name": "MNIST" if published else folder.resolve().name,
        "classes": [str(c) for c in range(max(10, int(labels.max()) + 1))],
        "checksums": "as published" if published else "not MNIST's",
    }
    return ImageData(images[:, None].contiguous(), labels.long(), seed, about)


def _read(base: Path, name: str, reader) -> tuple[Tensor, bool]:
    """The tensor in a file, and whether the file is the published one."""
    path = base / name
    if path.is_file():
        return _parse(path, reader, path)
    packed = path.with_name(name + ".gz")
    if not packed.is_file():
        raise FileNotFoundError(f"data: {packed} is missing; all four MNIST files must be in {base}")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / name
        try:
            with gzip.open(packed) as file, open(plain, "wb") as target:
                shutil.copyfileobj(file, target)
        except (OSError, EOFError) as error:
            raise ValueError(f"data: {packed} is damaged ({error}); copy it again") from error
        return _parse(plain, reader, packed)


def _parse(plain: Path, reader, path: Path) -> tuple[Tensor, bool]:
    try:
        tensor = reader(str(plain))
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"data: {path} is damaged ({error}); copy it again") from error
    known = hashlib.md5(plain.read_bytes(), usedforsecurity=False).hexdigest() == PUBLISHED[plain.name]
    return torch.as_tensor(tensor), known

"""Image data sets in memory: uint8 [N, C, H, W] and labels."""

import gzip
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_FILES = {True: "train", False: "t10k"}


class ImageData:
    """A data set that fits in memory, with an order of visits that is a pure function of (seed, position)."""

    def __init__(self, images: Tensor, labels: Tensor | None, seed: int = 0):
        if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            raise ValueError(f"images: expected uint8 [N, C, H, W] with N >= 1, got {images.dtype} {tuple(images.shape)}")
        self.images, self.labels, self.seed = images, labels, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def indices(self, start: int, count: int) -> Tensor:
        """Which images are visited at positions start ... start + count - 1: every epoch is a fresh permutation."""
        picked = []
        for position in range(start, start + count):
            epoch, offset = divmod(position, len(self))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(len(self), generator=generator)
            picked.append(int(self._order[offset]))
        return torch.tensor(picked)

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """float32 images in [-1, 1] and int64 labels at these positions."""
        i = self.indices(start, count)
        return self.images[i].float() / 127.5 - 1, None if self.labels is None else self.labels[i]


def load_mnist(folder: str | Path, train: bool = True, download: bool = False, seed: int = 0) -> ImageData:
    """MNIST through torchvision, from `folder`/MNIST/raw or from the four original files (.gz or not) in `folder`.

    Nothing is downloaded unless `download` asks for it. Raises FileNotFoundError that says what is missing.
    """
    from torchvision.datasets import MNIST

    folder = Path(folder)
    loose = folder / f"{_FILES[train]}-images-idx3-ubyte"
    if not (folder / "MNIST" / "raw").is_dir() and (loose.is_file() or loose.with_name(loose.name + ".gz").is_file()):
        images, labels = _read_loose(folder, train)
    else:
        try:
            data = MNIST(folder, train=train, download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"data: no MNIST in {folder}; it needs {loose.name} (.gz or not) and the labels beside it, or MNIST/raw as "
                f"torchvision lays it out. --download fetches it there"
            ) from error
        images, labels = data.data, data.targets
    return ImageData(images[:, None].contiguous(), labels.long(), seed)


def _read_loose(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    def read_plain(plain: Path, reader, path: Path):
        try:
            return reader(str(plain))
        except (AssertionError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"data: {path} is damaged ({error}); copy it again") from error

    def read(name: str, reader):
        path = folder / f"{_FILES[train]}-{name}"
        if path.is_file():
            return read_plain(path, reader, path)
        packed = path.with_name(path.name + ".gz")
        if not packed.is_file():
            raise FileNotFoundError(f"data: {packed} is missing; all four MNIST files must be in {folder}")
        with tempfile.NamedTemporaryFile() as plain:
            try:
                with gzip.open(packed) as file:
                    shutil.copyfileobj(file, plain)
            except (OSError, EOFError) as error:
                raise ValueError(f"data: {packed} is damaged ({error}); copy it again") from error
            plain.flush()
            return read_plain(Path(plain.name), reader, packed)

    images, labels = read("images-idx3-ubyte", read_image_file), read("labels-idx1-ubyte", read_label_file)
    if len(images) != len(labels):
        raise ValueError(
            f"data: {folder} has {len(images)} {_FILES[train]}-images but {len(labels)} labels; copy both again"
        )
    return images, labels

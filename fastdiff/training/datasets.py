"""The files of data sets: MNIST, CIFAR-10, folders and zips of images; whatever is wrong with them is said with the file."""

import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.training.data import ImageData
from fastdiff.training.mnist import load_mnist, mnist_folder

FORMATS = (
    "MNIST's four files or MNIST/raw/, cifar-10-batches-py/, or images (.png, .jpg, ...) in a folder or zip, "
    "with a sub-folder for each class where there are classes"
)
ARCHIVE_BYTES = 2**31  # of one image in a zip, unpacked: more is a trap, not an image


SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def load_images(
    path: str | Path,
    train: bool = True,
    *,
    size: int | None = None,
    download: str | None = None,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
) -> ImageData:
    """The data set in `path`, told by what is there.

    Args:
        path: a folder as torchvision lays out MNIST or CIFAR-10, MNIST's four files, a folder of images (a sub-folder for
            each class, or none), or a zip of such a folder.
        train: the training images; else the test images, of a folder those in its sub-folder "test".
        size: cut images of a folder or zip to squares about their centre and resize them to this height and width.
        download: "mnist" or "cifar10": fetch it where it is missing.
        seed: of the order in which images are visited.
        shape: (C, H, W) of the images that are wanted; where MNIST and CIFAR-10 lie in one folder, it tells which.

    Raises: FileNotFoundError; ValueError naming the file that is damaged or does not fit the others.
    """
    path = Path(path)
    if download not in (None, "mnist", "cifar10"):
        raise ValueError(f"download: {download!r} cannot be fetched; only mnist and cifar10 can. Give a folder that has it")
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise ValueError(f"data: {path} is a file, but no zip; give {FORMATS}")
        return _from_zip(path, train, size, seed)
    if not path.is_dir() and download is None:
        raise FileNotFoundError(f"data: {path} does not exist; give {FORMATS}")
    kind = download or _kind(path, shape)
    if kind == "mnist":
        return load_mnist(path, train, download == "mnist", seed)
    if kind == "cifar10":
        inside = path.parent if path.name == "cifar-10-batches-py" else path
        return load_cifar10(inside, train, download == "cifar10", seed)
    return _from_folder(path, train, size, seed)


def _kind(path: Path, shape: tuple[int, ...] | None) -> str | None:
    """ "mnist", "cifar10", or None: a folder of images."""
    found = {
        "mnist": mnist_folder(path) is not None,
        "cifar10": path.name == "cifar-10-batches-py" or (path / "cifar-10-batches-py").is_dir(),
    }
    kinds = [kind for kind, there in found.items() if there]
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    fitting = [kind for kind in kinds if shape is None or SHAPES[kind] == tuple(shape)]
    if len(fitting) != 1:
        wanted = "" if shape is None else f", neither with images of {' x '.join(map(str, shape))}"
        raise ValueError(
            f"data: MNIST and CIFAR-10 both lie in {path}{wanted}; give {path / 'MNIST'}, {path / 'cifar-10-batches-py'} "
            f"or the folder of other images"
        )
    return fitting[0]


def load_cifar10(folder: str | Path, train: bool = True, download: bool = False, seed: int = 0) -> ImageData:
    """CIFAR-10 through torchvision from `folder`/cifar-10-batches-py; every file's MD5 is checked before it is read."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    base = Path(folder) / CIFAR10.base_folder
    if not download:
        for name, md5 in [
            *(CIFAR10.train_list if train else CIFAR10.test_list),
            (CIFAR10.meta["filename"], CIFAR10.meta["md5"]),
        ]:
            if not (base / name).is_file():
                raise FileNotFoundError(
                    f"data: {base / name} is missing; all files of CIFAR-10's python version must be there"
                )
            if not check_integrity(str(base / name), md5):
                raise ValueError(f"data: {base / name} is damaged (its MD5 is not {md5}); copy it again")
    data = CIFAR10(str(folder), train=train, download=download)
    images = torch.from_numpy(np.ascontiguousarray(np.asarray(data.data).transpose(0, 3, 1, 2)))
    about = {"name": "CIFAR-10", "classes": list(data.classes), "checksums": "as published"}
    return ImageData(images, torch.tensor(data.targets), seed, about)


def _from_folder(root: Path, train: bool, size: int | None, seed: int) -> ImageData:
    root = _split(root, train)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and _is_image(p.name))
    return _assemble(root, files, lambda name: root / name, size, seed)


def _from_zip(path: Path, train: bool, size: int | None, seed: int) -> ImageData:
    with zipfile.ZipFile(path) as archive:
        infos = {i.filename: i for i in archive.infolist() if not i.is_dir() and _is_image(i.filename)}
        tops = {name.split("/")[0] for name in infos if "/" in name}
        part = f"{'train' if train else 'test'}/"
        prefix = part if {"train", "test"} <= tops else ""
        if not train and not prefix:
            raise FileNotFoundError(f"data: {path} has no folder test/ beside train/; there are no test images in it")
        names = sorted(name[len(prefix) :] for name in infos if name.startswith(prefix))

        def opened(name: str):
            info = infos[prefix + name]
            if info.file_size > ARCHIVE_BYTES:
                raise ValueError(f"data: {name} in {path} unpacks to {info.file_size:,} bytes; that is no image")
            return archive.open(info)

        return _assemble(path, names, opened, size, seed)


def _split(root: Path, train: bool) -> Path:
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root / ("train" if train else "test")
    if not train:
        raise FileNotFoundError(f"data: {root} has no folder test beside train; there are no test images in it")
    return root


def _is_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return name.lower().endswith(IMG_EXTENSIONS) and not os.path.basename(name).startswith(".")


def _assemble(root: Path, names: list[str], source, size: int | None, seed: int) -> ImageData:
    """Decode the images in the order of their names; first-level folders, where there are several, are the classes."""
    if not names:
        raise FileNotFoundError(f"data: no images in {root}; give {FORMATS}")
    tops = [name.replace(os.sep, "/").split("/")[0] if "/" in name.replace(os.sep, "/") else None for name in names]
    classes = sorted({top for top in tops if top is not None})
    if classes and None in tops:
        loose = names[tops.index(None)]
        raise ValueError(f"data: {root} has images in class folders and {loose} beside them; move it into a folder or away")
    if root.is_dir():
        empty = [
            p.name for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".") and p.name not in classes
        ]
        if classes and empty:
            raise ValueError(f"data: the class folder {root / empty[0]} holds no image; fill or remove it")
    images = _decode(root, names, source, size)
    about = {"name": root.stem, "classes": classes} if len(classes) > 1 else {"name": root.stem}
    labels = torch.tensor([classes.index(top) for top in tops if top is not None]) if len(classes) > 1 else None
    return ImageData(images, labels, seed, about)


def _decode(root: Path, names: list[str], source, size: int | None) -> Tensor:
    mode, first, out = "L", "", None
    for i, name in enumerate(names):
        pixels, own = _pixels(root, name, source, mode, size)
        if own == "RGB" and mode == "L":  # the first coloured image: grey ones before it become coloured too
            mode = "RGB"
            out = None if out is None else np.repeat(out, 3, axis=1)
        if out is None:
            first, shape = name, (len(names), pixels.shape[0], *pixels.shape[1:])
            _fits_memory(root, shape)
            out = np.empty(shape, np.uint8)
        if pixels.shape != out.shape[1:]:
            a, b = (f"{s[2]} x {s[1]}" for s in (pixels.shape, out.shape[1:]))
            raise ValueError(
                f"data: {name} in {root} is {a} pixels, {first} is {b}; give --image-size to cut and resize all alike"
            )
        out[i] = pixels
    assert out is not None
    return torch.from_numpy(out)


def _pixels(root: Path, name: str, source, mode: str, size: int | None) -> tuple[np.ndarray, str]:
    """uint8 [C, H, W] in `mode`, or in RGB where the image has colours; and the mode."""
    try:
        where = source(name)
        with where if hasattr(where, "read") else open(where, "rb") as file, Image.open(file) as picture:
            grey = picture.mode in ("1", "L", "LA", "I;16")
            mode = "L" if grey and mode == "L" else "RGB"
            picture = picture.convert(mode)
            if size is not None:
                edge = min(picture.size)
                left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
                law = Image.Resampling.BOX if edge % size == 0 else Image.Resampling.BICUBIC
                picture = picture.resize((size, size), law, (left, top, left + edge, top + edge))
            pixels = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: {name} in {root} is damaged or no image ({error}); replace or remove it") from error
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), mode


def _fits_memory(root: Path, shape: tuple[int, ...]) -> None:
    try:
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(table["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return  # not Linux: the allocation itself has to tell
    needed = int(np.prod(shape, dtype=np.float64))
    if needed > 0.9 * free:
        raise ValueError(
            f"data: {shape[0]:,} images in {root} need {needed / 2**30:.1f} GiB as bytes, {free / 2**30:.1f} GiB are free; "
            f"give fewer images or a smaller --image-size"
        )

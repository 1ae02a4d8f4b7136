"""Data sets as people have them: CIFAR-10, folders and zips of images; whole, and wrong in every common way."""

import hashlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.training import load_cifar10, load_images


def picture(path, value, size=(6, 4), mode="RGB"):
    """An image [W, H] whose pixels tell it apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.arange(size[0] * size[1]) + value).astype(np.uint8).reshape(size[::-1])
    image = Image.fromarray(pixels)
    image.convert(mode).save(path)
    return pixels


@pytest.fixture
def cats(tmp_path):
    """Two classes of three PNGs."""
    for k, name in enumerate(("black", "white")):
        for i in range(3):
            picture(tmp_path / "cats" / name / f"{i}.png", 40 * k + i)
    return tmp_path / "cats"


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders(cats, packed):
    data = load_images(zipped(cats) if packed else cats)
    assert data.shape == (3, 4, 6) and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.about["classes"] == ["black", "white"] and data.classes == 2
    expected = picture(cats / "white" / "1.png", 41)
    assert torch.equal(data.images[4], torch.from_numpy(expected).expand(3, 4, 6))


@pytest.mark.parametrize("nested", [False, True])
def test_without_labels(tmp_path, nested):
    """A flat folder, or torchvision's layout with a single one, has no labels; grey images stay grey."""
    for i in range(3):
        picture(tmp_path / "all" / ("images" if nested else "") / f"{i}.png", i, mode="L")
    data = load_images(tmp_path / "all")
    assert data.labels is None and data.classes == 0 and data.shape == (1, 4, 6)


def test_grey_among_coloured(tmp_path):
    grey, coloured = picture(tmp_path / "a.png", 3, mode="L"), picture(tmp_path / "b.png", 9)
    data = load_images(tmp_path)
    assert torch.equal(data.images[0], torch.from_numpy(grey).expand(3, 4, 6))
    assert torch.equal(data.images[1], torch.from_numpy(coloured).expand(3, 4, 6))


def test_cut_and_resized(tmp_path):
    picture(tmp_path / "wide.png", 0, (8, 4), "L")
    picture(tmp_path / "tall.png", 0, (4, 8), "L")
    wide = np.arange(32).reshape(4, 8)[:, 2:6]
    data = load_images(tmp_path, size=2)
    assert data.shape == (1, 2, 2)
    assert torch.equal(data.images[1, 0], torch.from_numpy(np.floor(wide.reshape(2, 2, 2, 2).mean((1, 3)) + 0.5)).byte())


def test_train_and_test(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for i in range(n):
            picture(tmp_path / "d" / part / f"{i}.png", i)
    for path in (tmp_path / "d", zipped(tmp_path / "d")):
        assert len(load_images(path)) == 3 and len(load_images(path, train=False)) == 2


def test_mixed_sizes(cats):
    picture(cats / "white" / "9.png", 0, (5, 4))
    with pytest.raises(
        ValueError, match=r"data: white.9.png in .*cats is 5 x 4 pixels, black.0.png is 6 x 4; give --image-size"
    ):
        load_images(cats)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["cut", "text"])
def test_corrupt_image(cats, damage, packed):
    path = cats / "white" / "1.png"
    path.write_bytes(path.read_bytes()[:-40] if damage == "cut" else b"<html>404</html>")
    with pytest.raises(ValueError, match=r"data: white.1.png in .*cats.* is damaged or no image \(.*; replace or remove it"):
        load_images(zipped(cats) if packed else cats)


def test_damaged_zip(cats):
    path = zipped(cats)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"white/1.png") + 60  # inside the stored bytes
    whole[start : start + 4] = b"\0\0\0\0"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"data: white.1.png in .*cats.zip is damaged"):
        load_images(path)
    path.write_bytes(b"PK but nothing else")
    with pytest.raises(ValueError, match=r"data: .*cats.zip is a file, but no zip; give MNIST's four files"):
        load_images(path)


def test_wrong_folders(cats, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .*nowhere does not exist; give MNIST's four files or"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data: no images in .*empty; give MNIST's"):
        load_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"data: .*cats has no folder test beside train"):
        load_images(cats, train=False)
    (cats / "red").mkdir()
    with pytest.raises(ValueError, match=r"data: the class folder .*red holds no image; fill or remove it"):
        load_images(cats)
    (cats / "red").rmdir()
    picture(cats / "loose.png", 0)
    with pytest.raises(ValueError, match=r"data: .*cats has images in class folders and loose.png beside them"):
        load_images(cats)


def test_too_large_for_memory(cats, monkeypatch):
    from fastdiff.training import datasets

    read_text = datasets.Path.read_text
    monkeypatch.setattr(
        datasets.Path, "read_text", lambda p: "MemAvailable: 0 kB" if str(p) == "/proc/meminfo" else read_text(p)
    )
    with pytest.raises(ValueError, match=r"data: 6 images in .*cats need .* GiB as bytes, 0.0 GiB are free"):
        load_images(cats)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's files with 4 images each; torchvision is told their checksums."""
    from torchvision.datasets import CIFAR10

    base, rng = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir()
    lists = {}
    for train, names in ((True, [f"data_batch_{i}" for i in range(1, 6)]), (False, ["test_batch"])):
        lists[train] = []
        for name in names:
            content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 4).tolist()}
            (base / name).write_bytes(pickle.dumps(content))
            lists[train].append([name, hashlib.md5((base / name).read_bytes()).hexdigest()])
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", lists[True])
    monkeypatch.setattr(CIFAR10, "test_list", lists[False])
    md5 = hashlib.md5((base / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return tmp_path


def test_cifar(cifar):
    """From the folder above and from the folder itself; pixels as the rows of the files say."""
    data, again = load_images(cifar), load_images(cifar / "cifar-10-batches-py")
    content = pickle.loads((cifar / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    assert len(data) == 20 and data.shape == (3, 32, 32) and data.fingerprint == again.fingerprint
    assert torch.equal(data.images[5], torch.from_numpy(content["data"][1].reshape(3, 32, 32)))
    assert data.labels[4:8].tolist() == content["labels"] and data.about["classes"][3] == "class 3"
    assert len(load_cifar10(cifar, train=False)) == 4


def test_two_data_sets_in_one_folder(cifar, mnist_folder):
    """As downloads to one folder leave them: the shape tells which is meant, and never silently the first."""
    raw = cifar / "MNIST" / "raw"
    shutil.copytree(mnist_folder, raw)
    assert load_images(cifar, shape=(1, 28, 28)).shape == (1, 28, 28)
    assert load_images(cifar, shape=(3, 32, 32)).about["name"] == "CIFAR-10"
    for folder in (cifar / "MNIST", raw):
        assert load_images(folder).shape == (1, 28, 28)
    assert load_images(cifar / "cifar-10-batches-py").shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"data: MNIST and CIFAR-10 both lie in .*; give .*MNIST, .*cifar-10-batches-py or"):
        load_images(cifar)
    with pytest.raises(ValueError, match=r"both lie in .*, neither with images of 3 x 64 x 64; give"):
        load_images(cifar, shape=(3, 64, 64))


def test_cifar_damaged_or_missing(cifar):
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(ValueError, match=r"data: .*data_batch_3 is damaged \(its MD5 is not [0-9a-f]{32}\); copy it again"):
        load_images(cifar)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data: .*data_batch_3 is missing; all files"):
        load_images(cifar)


def test_only_known_sets_are_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"download: 'cats' cannot be fetched; only mnist and cifar10 can"):
        load_images(tmp_path, download="cats")

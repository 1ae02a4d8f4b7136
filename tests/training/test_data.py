"""MNIST's files, whole, missing and damaged, and the order in which images are visited."""

import gzip
import shutil

import numpy as np
import pytest
import torch

from fastdiff.training import ImageData, load_mnist


def numbered(n):
    return torch.arange(n).to(torch.uint8).reshape(n, 1, 1, 1)


def test_every_epoch_visits_every_image_once():
    data = ImageData(numbered(10), None)
    visits = data.indices(0, 30).reshape(3, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in visits)
    assert len({tuple(epoch.tolist()) for epoch in visits}) == 3, "epochs repeat their order"


def test_order_is_a_function_of_seed_and_position():
    """Whatever was asked before: that is what lets a resumed run continue where it was."""
    data, other = ImageData(numbered(10), None), ImageData(numbered(10), None, seed=1)
    whole = data.indices(0, 50)
    for start, count in ((37, 5), (3, 20), (8, 4), (0, 1)):
        assert torch.equal(data.indices(start, count), whole[start : start + count])
    assert not torch.equal(other.indices(0, 50), whole)


def test_batch():
    data = ImageData(numbered(256), torch.arange(256))
    x, labels = data.batch(100, 256)
    assert x.dtype == torch.float32 and x.shape == (256, 1, 1, 1) and labels.dtype == torch.int64
    torch.testing.assert_close(x.flatten(), labels.float() / 127.5 - 1)
    assert x.min() == -1 and x.max() == 1


@pytest.mark.parametrize("images", [torch.zeros(3, 1, 2, 2), torch.zeros(3, 2, 2).byte(), torch.zeros(0, 1, 2, 2).byte()])
def test_bad_images(images):
    with pytest.raises(ValueError, match=r"images: expected uint8 \[N, C, H, W\] with N >= 1, got"):
        ImageData(images, None)


@pytest.mark.parametrize("packed", [True, False])
def test_four_files(mnist_folder, tmp_path, packed):
    """The original files, packed or not, against reading the bytes by hand."""
    for file in mnist_folder.iterdir():
        if packed:
            shutil.copy(file, tmp_path)
        else:
            (tmp_path / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    for train, name, n in ((True, "train", 48), (False, "t10k", 8)):
        data = load_mnist(tmp_path, train)
        raw = gzip.decompress((mnist_folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
        expected = np.frombuffer(raw, np.uint8, offset=16).reshape(n, 1, 28, 28)
        assert torch.equal(data.images, torch.from_numpy(expected.copy()))
        assert data.labels.tolist() == [i % 10 for i in range(n)]


def test_torchvision_layout(mnist_folder, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in mnist_folder.iterdir():
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert torch.equal(load_mnist(tmp_path).images, load_mnist(mnist_folder).images)


def test_missing(tmp_path, mnist_folder):
    with pytest.raises(FileNotFoundError, match=r"data: no MNIST in .*train-images-idx3-ubyte .*--download fetches it"):
        load_mnist(tmp_path)
    shutil.copy(mnist_folder / "train-images-idx3-ubyte.gz", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte.gz is missing"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "cut inside", "labels short"])
def test_damaged(tmp_path, mnist_folder, damage):
    for file in mnist_folder.iterdir():
        shutil.copy(file, tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        path.write_bytes(b"<html>404</html>")
    elif damage == "cut inside":  # a sound archive of a file that was cut
        path.write_bytes(gzip.compress(gzip.decompress(whole)[:-100]))
    else:
        shutil.copy(tmp_path / "t10k-labels-idx1-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"data: .*train-.*(damaged|does not fit|labels)"):
        load_mnist(tmp_path)


def test_fingerprint():
    """Another pixel, label or shape is another data set."""
    data = ImageData(numbered(12), torch.arange(12))
    assert data.fingerprint == ImageData(numbered(12), torch.arange(12), seed=5).fingerprint
    others = [
        ImageData(numbered(12) + 1, torch.arange(12)),
        ImageData(numbered(12), torch.arange(12) + 1),
        ImageData(numbered(12), None),
        ImageData(numbered(12).reshape(12, 1, 1, 1).reshape(3, 4, 1, 1), None),
    ]
    assert len({d.fingerprint for d in others} | {data.fingerprint}) == 5


def test_labels_for_every_image():
    with pytest.raises(ValueError, match="labels: 3 of them for 12 images; give one for each"):
        ImageData(numbered(12), torch.arange(3))


def test_checksums_tell_mnist_from_others(mnist_folder, tmp_path, monkeypatch):
    """Other data in MNIST's format is read, and not called MNIST."""
    import hashlib

    from fastdiff.training import mnist

    assert load_mnist(mnist_folder).about["checksums"] == "not MNIST's"
    sums = {
        f.stem: hashlib.md5(gzip.decompress(f.read_bytes())).hexdigest() for f in mnist_folder.iterdir() if f.suffix == ".gz"
    }
    monkeypatch.setattr(mnist, "PUBLISHED", sums)
    about = load_mnist(mnist_folder).about
    assert (about["name"], about["checksums"], len(about["classes"])) == ("MNIST", "as published", 10)

"""Classifiers: what they learn, what their files hold, and what is said about files that are none."""

import pytest
import torch

from fastdiff.metrics import load_classifier, packaged_classifier
from fastdiff.metrics.classifier import Classifier
from fastdiff.training import ImageData
from fastdiff.training.classifier import accuracy, train_classifier


def stripes(n=64, channels=3, size=8):
    """Class 0 has horizontal stripes, class 1 vertical ones, at random phases."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    wave = (torch.arange(size) + torch.randint(0, 4, (n, 1), generator=generator)) % 4 < 2
    images = wave[:, None, :, None].expand(n, channels, size, size).clone()
    images[labels == 1] = images[labels == 1].transpose(2, 3)
    return ImageData((images * 200 + 20).byte(), labels, about={"classes": ["horizontal", "vertical"]})


def test_learns_and_comes_back(tmp_path):
    data = stripes()
    net = train_classifier(data, epochs=12, batch=8).rounded()
    assert accuracy(net, data) == 1.0
    net.save(tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    assert again.shape == (3, 8, 8) and again.classes == 2
    for a, b in zip(again.classify(data.images), net.classify(data.images), strict=True):
        assert torch.equal(a, b)
    assert again.features(data.images[:2].float() / 127.5 - 1).shape == (2, again.width)


def test_quarter_turns_need_no_labels():
    """A bright corner: how often the picture was turned can be told."""
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :3, :3] = torch.randint(100, 255, (64, 1, 3, 3), generator=torch.Generator().manual_seed(0)).byte()
    data = ImageData(images, None)
    with pytest.raises(ValueError, match=r"data: it has no labels .*--rotations"):
        train_classifier(data)
    net = train_classifier(data, epochs=12, batch=8, rotations=True)
    assert not net.labelled and net.classes == 4 and accuracy(net, data) == 1.0


def test_other_sizes_and_channels():
    """Grey images for an RGB net are repeated, RGB ones for a grey net averaged, both resized; gradients go through."""
    net = Classifier((3, 16, 16), 2).eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    torch.testing.assert_close(net.prepare(x)[:, 0], net.prepare(x)[:, 2])
    net.features(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    x = torch.rand(2, 3, 56, 56)
    expected = x.mean(1, keepdim=True).unflatten(2, (28, 2)).unflatten(4, (28, 2)).mean((3, 5))
    torch.testing.assert_close(Classifier((1, 28, 28), 10).prepare(x), expected)


def test_activations_reach_every_stage():
    for net, stages in ((Classifier((1, 28, 28), 10), 2), (Classifier((3, 32, 32), 10), 5)):
        maps = net.eval().activations(torch.zeros(2, *net.shape))
        assert len(maps) == stages and all(m.dim() == 4 and len(m) == 2 for m in maps)
        assert net.classify(torch.zeros(5, *net.shape), batch=2)[0].shape == (5, net.width)


def test_packaged():
    path = packaged_classifier((1, 28, 28))
    assert path is not None and path.stat().st_size < 500_000 and packaged_classifier((3, 32, 32)) is None
    net = load_classifier(path)
    assert net.info["accuracy"] >= 0.985 and net.classes == 10 and "MNIST" in net.name
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"classifier: .* is no file; make one with: fastdiff train-classifier"):
        load_classifier(tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"classifier: .* is no classifier of ours .*train-classifier"):
        load_classifier(path)
    with pytest.raises(ValueError, match="data: images of 4 x 4 are too small for a classifier"):
        Classifier((1, 4, 4), 2)

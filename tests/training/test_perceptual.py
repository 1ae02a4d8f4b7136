"""Perceptual distances: LPIPS as its package computes it, classifier features by hand, and what is said without weights."""

import hashlib

import pytest
import torch

from fastdiff.metrics.classifier import Classifier, packaged_classifier
from fastdiff.training import perceptual


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file like torchvision's, with small random weights."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(3)
    state = {f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}
    path = tmp_path_factory.mktemp("hub") / perceptual.VGG16
    torch.save(state, path)
    return path


def images(n=2, channels=3, size=40):
    torch.manual_seed(0)
    return torch.rand(2, n, channels, size, size) * 2 - 1


def test_lpips_is_the_package(backbone, monkeypatch):
    """The same numbers as the package's own forward with the same backbone, on enlarged, large and grey images."""
    monkeypatch.setattr(perceptual, "SHA256", hashlib.sha256(backbone.read_bytes()).hexdigest()[:8])
    generator = torch.get_rng_state()
    distance = perceptual.load("lpips", backbone)
    assert torch.equal(torch.get_rng_state(), generator) and distance.name == "LPIPS (VGG-16)"
    model = next(c.cell_contents for c in distance.features.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    assert perceptual.SIZE == 224
    monkeypatch.setattr(perceptual, "SIZE", 48)  # 224 takes seconds, and is the same but for its cost
    for channels, size in ((3, 40), (1, 28), (3, 56)):
        a, b = images(2, channels, size)
        wide = [x if size > 48 else torch.nn.functional.interpolate(x, (48, 48), mode="bilinear") for x in (a, b)]
        torch.testing.assert_close(distance(a, b), model(*wide).flatten(), rtol=1e-4, atol=1e-6)
    assert torch.equal(distance(a, a), torch.zeros(2))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    with torch.autocast("cpu", torch.bfloat16):
        low = distance(a, b)
    assert torch.equal(low, distance(a, b))


def test_missing_and_damaged_backbone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    says = r"vgg16-397923af.pth of torchvision, SHA-256 397923af.*--lpips-weights FILE.*--perceptual classifier"
    with pytest.raises(FileNotFoundError, match=r"weights of its backbone are missing, .*checkpoints.*" + says):
        perceptual.load("lpips")
    with pytest.raises(FileNotFoundError, match=r"missing, .*mine.pth is no file; " + "it is " + says):
        perceptual.load("lpips", tmp_path / "mine.pth")
    (tmp_path / "mine.pth").write_bytes(b"half a file")
    with pytest.raises(
        ValueError, match=r"mine.pth is not the backbone's file or is damaged, its SHA-256 is [0-9a-f]{8}.*" + says
    ):
        perceptual.load("lpips", tmp_path / "mine.pth")


def test_classifier_distance():
    """Mean over maps of the squared distance of unit feature vectors, averaged over places; the packaged LeNet's."""
    distance = perceptual.load("classifier", packaged_classifier((1, 28, 28)))
    a, b = images(3, 1, 28)
    by_hand = torch.zeros(3)
    net = distance.features.__self__
    for of_a, of_b in zip(net.activations(a), net.activations(b), strict=True):
        for i in range(3):
            ya, yb = (f[i].flatten(1).double() for f in (of_a, of_b))
            ya, yb = (y / y.norm(dim=0).clamp(min=1e-10) for y in (ya, yb))
            by_hand[i] += (ya - yb).square().sum(0).mean().float() / 2
    torch.testing.assert_close(distance(a, b), by_hand, rtol=1e-5, atol=1e-6)
    assert "LeNet" in distance.name and "classifier" in distance.name


def test_gradient_is_finite_where_features_vanish():
    """Flat images, whose features a ReLU sets to 0, and equal ones."""
    net = Classifier((3, 16, 16), 2).eval().requires_grad_(False)
    with torch.no_grad():
        net.net.norm.bias.fill_(-100.0)  # the first map is 0 everywhere
    distance = perceptual.Perceptual(net.activations, None, "mine")
    for b in (torch.zeros(2, 3, 16, 16), torch.rand(2, 3, 16, 16)):
        a = torch.zeros(2, 3, 16, 16, requires_grad=True)
        distance(a, b).sum().backward()
        assert torch.isfinite(a.grad).all()


def test_gradient_reaches_the_image():
    """Following it brings an image nearer."""
    distance = perceptual.load("classifier", packaged_classifier((1, 28, 28)))
    a, b = images(2, 1, 28)
    a.requires_grad_()
    before = distance(a, b).sum()
    (gradient,) = torch.autograd.grad(before, a)
    after = distance(a - 0.1 * gradient / gradient.norm(), b).sum()
    assert after < before


def test_bad_requests(tmp_path):
    with pytest.raises(ValueError, match="metric: 'l2' has no network; use one of lpips, classifier"):
        perceptual.load("l2")
    with pytest.raises(ValueError, match="classifier: give the file of one trained on this data set"):
        perceptual.load("classifier")
    with pytest.raises(FileNotFoundError, match=r"no.safetensors is no file; make one with: fastdiff train-classifier"):
        perceptual.load("classifier", tmp_path / "no.safetensors")

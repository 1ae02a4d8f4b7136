"""Perceptual distances: how far apart two images are in the features of a network that has learned to see.

    d(a, b) = sum over maps of the mean over places of w . (y_a - y_b)^2,   y = a map's features over their norm

"lpips" (Zhang et al. 2018): VGG-16's five maps and the weights w of the `lpips` package, on images enlarged to 224 x 224 as
in consistency models. "classifier": the maps of a classifier of this data set, equally weighted.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.metrics.classifier import load_classifier
from fastdiff.training.losses.distances import PERCEPTUAL

VGG16, SHA256 = "vgg16-397923af.pth", "397923af"  # torchvision's file, and how its SHA-256 begins
SOURCE = f"https://download.pytorch.org/models/{VGG16}"
SIZE = 224


class Perceptual:
    """d(a, b) -> [B] for images [B, C, H, W] in [-1, 1], differentiable in both.

    features: images -> maps [B, C_k, H_k, W_k]; weights: for each map w [C_k], 1 / (number of maps) where None;
    name: what reports call it. Computed in float32 also under autocast: it compares images that are nearly the same.
    """

    def __init__(self, features: Callable[[Tensor], Sequence[Tensor]], weights: Sequence[Tensor] | None, name: str):
        self.features, self.weights, self.name = features, weights, name

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            maps = list(zip(self.features(a.float()), self.features(b.float()), strict=True))
            total = torch.zeros(len(a), device=a.device)
            for k, (of_a, of_b) in enumerate(maps):
                squared = (_unit(of_a) - _unit(of_b)).square().mean((2, 3))  # [B, C_k]
                total = total + (squared.sum(1) / len(maps) if self.weights is None else squared @ self.weights[k])
        return total


def load(metric: str, weights: str | Path | None = None, *, device: str | torch.device = "cpu") -> Perceptual:
    """The distance of a consistency loss's option `metric`.

    weights: for "classifier" the file of `fastdiff train-classifier`; for "lpips" torchvision's of VGG-16, by default in
    its cache.

    Raises: FileNotFoundError, ValueError that say which file is needed, and what does without it.
    """
    if metric == "lpips":
        return _lpips(None if weights is None else Path(weights), torch.device(device))
    if metric != "classifier":
        raise ValueError(f"metric: {metric!r} has no network; use one of {', '.join(PERCEPTUAL)}")
    if weights is None:
        raise ValueError("classifier: give the file of one trained on this data set, made by fastdiff train-classifier")
    net = load_classifier(weights, device)
    return Perceptual(net.activations, None, f"classifier features: {net.name}")


def _unit(features: Tensor) -> Tensor:
    """Each place's features over their norm. Unlike the package's, its gradient is finite where all of them are 0."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)


def _lpips(path: Path | None, device: torch.device) -> Perceptual:
    state = torch.load(_backbone(path), map_location="cpu", weights_only=True)
    try:
        import lpips
    except ImportError as error:
        raise ValueError("lpips: the package is not installed; pip install lpips, or pip install -e '.[train]'") from error
    with warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")  # of torchvision's, about arguments that the package gives it
        model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # slice2.5.weight here is features.5.weight there
    own = model.net.state_dict()
    model.net.load_state_dict({key: state[f"features.{key.split('.', 1)[1]}"] for key in own})
    model = model.eval().requires_grad_(False).to(device)

    def features(x: Tensor) -> Sequence[Tensor]:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        if max(x.shape[2:]) < SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return model.net(model.scaling_layer(x))

    return Perceptual(features, [layer.model[-1].weight.flatten() for layer in model.lins], "LPIPS (VGG-16)")


def _backbone(path: Path | None) -> Path:
    """The file with VGG-16's weights, found and whole."""
    found = Path(torch.hub.get_dir()) / "checkpoints" / VGG16 if path is None else path
    remedy = (
        f"it is {VGG16} of torchvision, SHA-256 {SHA256}..., from {SOURCE}: put it there or give --lpips-weights FILE. "
        f"--perceptual classifier does without it: features of a classifier that fastdiff train-classifier made"
    )
    if not found.is_file():
        raise FileNotFoundError(f"lpips: the weights of its backbone are missing, {found} is no file; {remedy}")
    with open(found, "rb") as file:
        digest = _sha256(file)
    if not digest.startswith(SHA256):
        raise ValueError(
            f"lpips: {found} is not the backbone's file or is damaged, its SHA-256 is {digest[:8]}...; {remedy}"
        )
    return found


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()

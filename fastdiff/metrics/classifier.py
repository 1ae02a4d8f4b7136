"""Small classifiers: logits say what an image shows, the penultimate layer gives the features of the Frechet distance.

`fastdiff train-classifier` trains one on any labelled data set, and on an unlabelled one by telling quarter turns apart.
The one for MNIST is packaged.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.atomic import atomically

ASSETS = Path(__file__).parents[1] / "assets" / "classifiers"
KEY = "fastdiff-classifier"
COMMAND = "fastdiff train-classifier --data DIR --out FILE"


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with ReLU and more channels, for 28 x 28 grey images: 80,694 weights."""

    width = 84

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 5 * 5, self.width)
        self.fc2 = nn.Linear(self.width, classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """[B, 1, 28, 28] -> [B, 16, 28, 28] and [B, 32, 10, 10], after their ReLU."""
        first = F.relu(self.conv1(x))
        return [first, F.relu(self.conv2(F.max_pool2d(first, 2)))]

    def features(self, x: Tensor) -> Tensor:
        """[B, 1, 28, 28] -> [B, 84]."""
        x = F.max_pool2d(self.stages(x)[-1], 2)  # [B, 32, 5, 5]
        x = F.dropout(x.flatten(1), 0.25, self.training)
        return F.relu(self.fc1(x))

    def logits(self, features: Tensor) -> Tensor:
        return self.fc2(features)


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016), the first with a stride."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Four stages of a small residual network (He et al. 2016) for images of any size from 8 x 8 on: 700 k weights."""

    width = 128

    def __init__(self, channels: int, classes: int):
        super().__init__()
        sizes = (32, 32, 64, self.width)
        self.conv = nn.Conv2d(channels, sizes[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(sizes[0])
        self.blocks = nn.ModuleList(Residual(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(sizes))
        self.last = Residual(self.width, self.width, 2)
        self.fc = nn.Linear(self.width, classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> feature maps of 32, 32, 64, 128 and 128 channels, after their ReLU."""
        maps = [F.relu(self.norm(self.conv(x)))]
        for block in [*self.blocks, self.last]:
            maps.append(block(maps[-1]))
        return maps

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 128], means over the last map."""
        return F.dropout(self.stages(x)[-1].mean((2, 3)), 0.1, self.training)

    def logits(self, features: Tensor) -> Tensor:
        return self.fc(features)


class Classifier(nn.Module):
    """A classifier with the shape of its images and what is known about it.

    shape: (C, H, W) it was made for; others are resized (area or bilinear), grey ones repeated or RGB ones averaged.
    info: accuracy, data, command, licence, versions; "rotations" where its classes are quarter turns, not labels.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, info: dict[str, Any] | None = None):
        super().__init__()
        if min(shape[1:]) < 8:
            raise ValueError(f"data: images of {shape[1]} x {shape[2]} are too small for a classifier; it needs 8 x 8")
        self.shape, self.classes, self.info = tuple(shape), classes, info or {}
        self.net: LeNet | ResNet = LeNet(classes) if self.shape == (1, 28, 28) else ResNet(shape[0], classes)

    @property
    def width(self) -> int:
        """Length of the features."""
        return self.net.width

    @property
    def name(self) -> str:
        """Short name that reports carry: the net and its data."""
        kind = "quarter turns of " if self.info.get("rotations") else ""
        return f"{type(self.net).__name__} ({kind}{self.info.get('data', 'unnamed data')})"

    @property
    def labelled(self) -> bool:
        """False where its classes are no labels of the data."""
        return not self.info.get("rotations")

    def prepare(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], uint8 or float in [-1, 1], as the net takes them; differentiable for floats."""
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
        channels, size = self.shape[0], self.shape[1:]
        if x.shape[1] != channels:
            x = x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        if tuple(x.shape[2:]) != tuple(size):
            smaller = x.shape[2] > size[0]
            x = F.interpolate(x, size, mode="area") if smaller else F.interpolate(x, size, mode="bilinear")
        return x

    def activations(self, x: Tensor) -> list[Tensor]:
        """Feature maps of every stage, for perceptual distances: x float [B, C, H, W] in [-1, 1]."""
        return self.net.stages(self.prepare(x))

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width]."""
        return self.net.features(self.prepare(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]."""
        return self.net.logits(self.features(x))

    @torch.inference_mode()
    def classify(self, images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] -> features float64 [N, width] and classes [N], on the CPU."""
        device, features, classes = next(self.parameters()).device, [], []
        for part in images.split(batch):
            f = self.features(part.to(device))
            features.append(f.double().cpu())
            classes.append(self.net.logits(f).argmax(1).cpu())
        return torch.cat(features), torch.cat(classes)

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file with the weights as float16, which is what keeps it small."""
        state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in self.net.state_dict().items()}
        about = {"shape": self.shape, "classes": self.classes, "info": self.info}
        atomically(path, lambda temporary: save_file(state, temporary, metadata={KEY: json.dumps(about)}))

    def rounded(self) -> "Classifier":
        """Itself, with the weights that a file would hold: a figure of merit is that of what everybody loads."""
        with torch.no_grad():
            for p in [*self.parameters(), *self.buffers()]:
                if p.is_floating_point():
                    p.copy_(p.half())
        return self


def packaged_classifier(shape: tuple[int, int, int] | None) -> Path | None:
    """The file of the packaged classifier for images of this shape; None where there is none."""
    path = ASSETS / "mnist-lenet.safetensors"
    return path if shape is not None and tuple(shape) == (1, 28, 28) else None


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """A classifier from its file, in eval mode, without gradients of its weights.

    Raises: FileNotFoundError, ValueError with the command that makes one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"classifier: {path} is no file; make one with: {COMMAND}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        found = Classifier(tuple(about["shape"]), about["classes"], about["info"])
        found.net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except Exception as error:
        raise ValueError(
            f"classifier: {path} is no classifier of ours ({str(error)[:200]}); make one with: {COMMAND}"
        ) from error
    return found.eval().requires_grad_(False).to(device)

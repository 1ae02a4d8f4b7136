"""Training of the small classifiers of `fastdiff.metrics`, for measuring and as a perceptual distance."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.metrics.classifier import Classifier
from fastdiff.training.data import ImageData

TURNS = 4


def turned(x: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, H] by quarter turns, in equal numbers, and how many turns: labels for data without labels."""
    turns = (torch.arange(len(x), device=x.device) + position) % TURNS
    parts = torch.stack([x.rot90(k, (2, 3)) for k in range(TURNS)], 1)
    return parts[torch.arange(len(x), device=x.device), turns], turns


def train_classifier(
    data: ImageData,
    epochs: int = 6,
    batch: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    rotations: bool = False,
    device: str | torch.device = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Classifier:
    """Cross-entropy with AdamW and one learning rate cycle; each batch is shifted by up to H / 14 pixels.

    data: with labels, or `rotations` to tell quarter turns apart instead (Gidaris et al. 2018), for the features' sake.
    Raises: ValueError without labels, or where images are not square and `rotations` is asked for.
    """
    if data.labels is None and not rotations:
        raise ValueError(
            "data: it has no labels (one sub-folder for each class), which a classifier learns from; --rotations trains it "
            "to tell quarter turns apart instead, for its features"
        )
    if rotations and data.shape[1] != data.shape[2]:
        raise ValueError(f"data: quarter turns need square images, these are {data.shape[1]} x {data.shape[2]}")
    torch.manual_seed(seed)
    net = Classifier(data.shape, TURNS if rotations else data.classes, {"rotations": True} if rotations else {})
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    steps = math.ceil(epochs * len(data) / batch) if len(data) < batch else epochs * len(data) // batch
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    shift = max(1, data.shape[1] // 14)
    for step in range(steps):
        x, labels = data.batch(step * batch, batch, device)
        if rotations or labels is None:
            x, labels = turned(x, step)
        dy, dx = torch.randint(-shift, shift + 1, (2,)).tolist()
        loss = F.cross_entropy(net(x.roll((dy, dx), (2, 3))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if step % 200 == 0:
            say(f"step {step} of {steps}: loss {float(loss.detach()):.4f}")
    return net.eval().requires_grad_(False)


def accuracy(net: Classifier, data: ImageData) -> float:
    """Fraction of the images (of their quarter turns, where those are its classes) that it gets right."""
    if net.labelled:
        if data.labels is None:
            raise ValueError("data: it has no labels to compare with")
        return float((net.classify(data.images)[1] == data.labels.cpu()).double().mean())
    right = 0
    for first, part in enumerate(data.images.split(500)):
        x, labels = turned(part, first)
        right += int((net.classify(x)[1] == labels.cpu()).sum())
    return right / len(data)

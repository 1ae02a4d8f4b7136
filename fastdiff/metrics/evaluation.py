"""What a model's images are worth at a number of evaluations: distance to real ones, label agreement, speed.

FD is the Frechet distance in the features of a small classifier of ours. It is not FID: other features, other scale.
Compare it with its floor, the same number of real images against the same reference, and with nothing else.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.metrics.classifier import Classifier
from fastdiff.metrics.frechet import Gaussian, Moments, frechet, gaussian
from fastdiff.model import Model
from fastdiff.sample import run
from fastdiff.samplers import Adaptive

GOLDEN = (5**0.5 - 1) / 2
DRAWS = 5  # random sets of real images whose distance is averaged to the floor
CHUNK = 500  # images that are in memory at a time


def natural_labels(n: int, counts: np.ndarray) -> list[int]:
    """n classes as frequent as in `counts`, in an order whose every beginning is so too (golden-ratio sequence)."""
    edges = np.cumsum(counts) / np.sum(counts)
    return np.searchsorted(edges, (0.5 + GOLDEN * np.arange(n)) % 1, side="right").tolist()


def halves(n: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random halves of 0 ... n - 1."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return order[: n // 2], order[n // 2 :]


@dataclasses.dataclass
class Reference:
    """Real images as features: half B is what images are compared with, half A gives the floor.

    The halves are disjoint, so the floor is what a perfect generator would reach.
    """

    classifier: Classifier
    features: Tensor  # of half A, float64 [n, width]
    labels: Tensor | None  # of half A
    other: Gaussian  # half B
    counts: np.ndarray | None  # images of each class
    accuracy: float | None  # of the classifier on all of them

    @classmethod
    def of(cls, images: Tensor, labels: Tensor | None, classifier: Classifier) -> "Reference":
        """From real images uint8 [N, C, H, W], N >= 4, and their labels or None."""
        if len(images) < 4:
            raise ValueError(f"data: {len(images)} images make no reference; give at least 4, better thousands")
        features, classes = classifier.classify(images)
        a, b = halves(len(images))
        judged = labels is not None and classifier.labelled and int(labels.max()) < classifier.classes
        accuracy = float((classes == labels.cpu()).double().mean()) if judged and labels is not None else None
        counts = None if labels is None else np.bincount(labels.cpu().numpy())
        return cls(
            classifier, features[a], None if labels is None else labels.cpu()[a], gaussian(features[b]), counts, accuracy
        )

    def floor(self, n: int) -> float:
        """FD of n real images of half A, mean over a few draws; beyond half A's size that of all of it."""
        if n >= len(self.features):
            return frechet(gaussian(self.features), self.other)
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randperm(len(self.features), generator=generator)[:n] for _ in range(DRAWS)]
        return float(np.mean([frechet(gaussian(self.features[d]), self.other) for d in draws]))


@dataclasses.dataclass
class Row:
    """One line: a model at one number of evaluations."""

    nfe: int  # network calls counted for each image; for rk45, which takes as many as each needs, the most
    sampler: str
    n: int
    fd: float
    floor: float  # FD of n real images
    agreement: float | None  # fraction that the classifier reads as asked; None without labels
    images_per_second: float
    seconds: float
    seeds: tuple[int, int]  # first and last
    times: list[float]  # where the network was evaluated


def evaluate(
    model: Model,
    reference: Reference,
    nfe: int,
    n: int,
    *,
    first_seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Row:
    """Draw n images with seeds first_seed ... and judge them; no more than a batch of them is in memory.

    Labels, where the model has any, are as frequent as in the data. options: sampler, dtype and a sampler's own.
    Raises: ValueError where model, classifier and data do not fit each other.
    """
    _check(model, reference, n)
    labels = None
    if model.labels:
        counts = reference.counts if reference.counts is not None else np.ones(model.labels)
        labels = natural_labels(n, counts)
    moments, agreed, seconds, made = Moments(reference.classifier.width), 0, 0.0, None
    calls = set()
    for first in range(0, n, CHUNK):
        count = min(CHUNK, n - first)
        wanted = None if labels is None else labels[first : first + count]
        made = run(
            model,
            nfe,
            seeds=range(first_seed + first, first_seed + first + count),
            labels=wanted,
            batch_size=batch_size,
            device=device,
            progress=False,
            **options,
        )
        features, classes = reference.classifier.classify(made.images)
        moments.add(features)
        agreed += 0 if wanted is None else int((classes == torch.tensor(wanted)).sum())
        seconds += made.seconds
        calls.add(made.evaluations)
    assert made is not None
    if len(calls) != 1 and not isinstance(made.plan, Adaptive):
        raise RuntimeError(f"nfe: batches took different numbers of evaluations, {sorted(calls)}")
    return Row(
        nfe=max(calls),
        sampler=made.plan.name,
        n=n,
        fd=frechet(moments.gaussian, reference.other),
        floor=reference.floor(n),
        agreement=agreed / n if labels is not None and reference.accuracy is not None else None,
        images_per_second=n / seconds,
        seconds=seconds,
        seeds=(first_seed, first_seed + n - 1),
        times=[float(t) for t in made.plan.times],
    )


def _check(model: Model, reference: Reference, n: int) -> None:
    if n < 2:
        raise ValueError(f"n: {n} images have no covariance; give at least 2, better 1000")
    counts = reference.counts
    if model.labels and counts is not None and len(counts) > model.labels:
        raise ValueError(
            f"data: it has {len(counts)} classes, the model knows {model.labels}; give the model's own data set"
        )


def table(rows: Sequence[tuple[str, Row]]) -> str:
    """Rows with a name each, as fixed-width text."""
    wide = max([5, *(len(name) for name, _ in rows)])
    plan = max([7, *(len(row.sampler) for _, row in rows)])
    head = f"{'model':<{wide}}  {'sampler':<{plan}}{'NFE':>5}{'n':>8}{'FD':>10}{'floor':>9}{'FD/floor':>10}{'agreement':>11}"
    lines = [head + f"{'images/s':>11}"]
    for name, r in rows:
        agreement = "-" if r.agreement is None else f"{r.agreement:.2%}"
        ratio = r.fd / r.floor if r.floor > 0 else math.inf
        lines.append(
            f"{name:<{wide}}  {r.sampler:<{plan}}{r.nfe:>5}{r.n:>8,}{r.fd:>10.3f}{r.floor:>9.3f}{ratio:>10.2f}"
            f"{agreement:>11}{r.images_per_second:>11.1f}"
        )
    return "\n".join(lines)

"""Numbers that say how good generated digits are, and the same numbers of real ones.

FD-LeNet is the Frechet distance between two sets of images in the features of our own small classifier. It is not FID:
other features, other scale; compare it with its floor and with itself only. The floor of n images is FD-LeNet between n
real images of one random half of the training set and all of the other half. Generated images are compared with that
same other half, in equal number and with the class frequencies of real digits, because FD falls with the number of images.

The reference numbers were made once and are in tests/data; no image is stored. They come again with

    python tests/quality/measures.py --data DIR
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from fastdiff.metrics import Classifier, Gaussian, frechet, gaussian, load_classifier, packaged_classifier
from fastdiff.metrics.evaluation import halves, natural_labels
from fastdiff.training import load_mnist

REFERENCE = Path(__file__).parents[1] / "data" / "mnist-reference.safetensors"
COMMAND = "python tests/quality/measures.py --data DIR"
FLOOR_SIZES = {1_000: 20, 2_000: 20, 10_000: 5, 30_000: 1}  # number of images -> draws averaged; the last is half A itself


def judging_classifier() -> Classifier:
    """The packaged classifier, whose features FD-LeNet is about."""
    path = packaged_classifier((1, 28, 28))
    assert path is not None
    return load_classifier(path)


def pairwise(images: Tensor, labels: Tensor) -> np.ndarray:
    """Mean distance |x - y| between two different images of a class, for each of the ten: float64 [10]."""
    means = np.full(10, np.nan)
    for c in range(10):
        x = images[labels == c].flatten(1).float()
        if len(x) > 1:
            total = sum(float(torch.cdist(part, x).double().sum()) for part in x.split(1000))
            means[c] = total / (len(x) * (len(x) - 1))
    return means


def nearest(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to, and index of, the nearest of `others` for each image: [n], [n]."""
    x, best, index = images.flatten(1).float(), torch.full((len(images),), torch.inf), torch.zeros(len(images)).long()
    for first in range(0, len(others), 10_000):
        part = scaled(others[first : first + 10_000]).flatten(1)
        d, i = torch.cdist(x, part).min(1)
        index = torch.where(d < best, i + first, index)
        best = torch.minimum(best, d)
    return best, index


def scaled(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; others as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def floors(features: Tensor, labels: Tensor, other: Gaussian, counts: np.ndarray) -> dict[int, np.ndarray]:
    """{n: FD of each draw} of n of these features, in the classes of `natural_labels`, against `other`."""
    generator, found = torch.Generator().manual_seed(1), {}
    for n, draws in FLOOR_SIZES.items():
        if n == len(features):
            found[n] = np.array([frechet(gaussian(features), other)])
            continue
        wanted = np.bincount(natural_labels(n, counts), minlength=10)
        values = []
        for _ in range(draws):
            shuffled = torch.randperm(len(features), generator=generator)
            picked = [shuffled[labels[shuffled] == c][: wanted[c]] for c in range(10)]
            values.append(frechet(gaussian(features[torch.cat(picked)]), other))
        found[n] = np.array(values)
    return found


def judge(images: Tensor, labels: list[int], net: Classifier, reference: dict[str, np.ndarray]) -> dict[str, float]:
    """The quality of images [n, 1, 28, 28] in [-1, 1] that were asked to show `labels`.

    agreement: fraction that the classifier reads as asked. diversity, diversity_least: mean distance within a class over
    real digits', mean and least of the classes. fd, floor, ratio: FD-LeNet, the same for n real images, fd / floor.
    ratio_halves: fd over that of two halves of the real images, which is fair for n = 30,000 and severe for less.
    """
    features, classes = net.classify(images)
    wanted = torch.tensor(labels)
    diversity = pairwise(images, wanted) / reference["pairwise"]
    fd, least = frechet(gaussian(features), half_b(reference)), floor(reference, len(images))
    return {
        "agreement": float((classes == wanted).double().mean()),
        "diversity": float(diversity.mean()),
        "diversity_least": float(diversity.min()),
        "fd": fd,
        "floor": least,
        "ratio": fd / least,
        "ratio_halves": fd / float(reference["floor.30000"][0]),
    }


def make_reference(folder: Path) -> dict[str, np.ndarray]:
    """Everything that `load_reference` returns, from the data set in `folder`."""
    train, test = load_mnist(folder), load_mnist(folder, train=False)
    features, _ = judging_classifier().classify(train.images)
    a, b = halves(len(train))
    counts = np.bincount(train.labels.numpy(), minlength=10)
    sets = {"all": features, "a": features[a], "b": features[b]}
    out = {f"{name}.{field}": v for name, f in sets.items() for field, v in gaussian(f)._asdict().items()}
    for n, values in floors(features[a], train.labels[a], gaussian(features[b]), counts).items():
        out[f"floor.{n}"] = values
    # Every tenth test image: both halves of the test set, whose writers differ, are in it.
    probe, kind = scaled(test.images[::10]), test.labels[::10]
    distance, _ = nearest(probe, train.images)
    return out | {
        "label_counts": counts,
        "pairwise": pairwise(scaled(train.images), train.labels),
        "nearest.median": np.array([float(distance[kind == c].median()) for c in range(10)]),
        "nearest.ratios": np.sort((distance / torch.stack([distance[kind == c].median() for c in range(10)])[kind]).numpy()),
    }


def load_reference(path: Path = REFERENCE) -> tuple[dict[str, np.ndarray], dict]:
    """The cached numbers and how they were made.

    all, a, b (each with .mean and .cov): all training images, half A, half B. floor.N: FD of each draw of N images of A
    against B. label_counts [10]. pairwise [10]: mean distance within a class. nearest.median [10]: median over test images
    of a class of the distance to the nearest training image; nearest.ratios: each one's distance over its class's median.
    """
    with safe_open(path, "np") as file:
        numbers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return numbers, json.loads(file.metadata()["reference"])


def half_b(reference: dict[str, np.ndarray]) -> Gaussian:
    """The real images that generated ones are compared with."""
    return Gaussian(reference["b.mean"], reference["b.cov"])


def floor(reference: dict[str, np.ndarray], n: int) -> float:
    """FD-LeNet of n real images: linear in 1 / n, as its bias is, between and below the sizes measured, then constant."""
    sizes = np.array(sorted(FLOOR_SIZES, reverse=True), dtype=np.float64)
    values = [reference[f"floor.{int(size)}"].mean() for size in sizes]
    return float(np.interp(1 / n, 1 / sizes, values)) * max(1.0, sizes[-1] / n)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure real digits and write tests/data/mnist-reference.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four MNIST files")
    parser.add_argument("--out", type=Path, default=REFERENCE)
    args = parser.parse_args()
    numbers = make_reference(args.data)
    info = {"command": COMMAND, "classifier": judging_classifier().info, "data": "MNIST; nearest.*: every tenth test image"}
    save_file({k: np.ascontiguousarray(v) for k, v in numbers.items()}, args.out, metadata={"reference": json.dumps(info)})
    for n in FLOOR_SIZES:
        values = numbers[f"floor.{n}"]
        print(f"floor of {n:,} images: {values.mean():.4f} (standard deviation {values.std():.4f} over {len(values)} draws)")
    print(f"mean distance within a class: {np.array2string(numbers['pairwise'], precision=2)}")
    print(f"median distance of a test image to its nearest: {np.array2string(numbers['nearest.median'], precision=2)}")
    print(f"wrote {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()

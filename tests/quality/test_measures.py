"""The judges are judged first: exact answers, and real digits measured as if they were generated."""

import lenet
import measures
import numpy as np
import pytest
import torch


def random_gaussian(rng, d, rank):
    a = rng.standard_normal((d, rank))
    return measures.Gaussian(rng.standard_normal(d), a @ a.T)


def test_frechet_of_commuting_covariances():
    # Diagonal covariances: |m|^2 + sum (s_a - s_b)^2, the textbook value.
    s, r = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.0])
    a, b = measures.Gaussian(np.zeros(3), np.diag(s**2)), measures.Gaussian(np.array([1.0, 2.0, 2.0]), np.diag(r**2))
    assert measures.frechet(a, b) == pytest.approx(9 + ((s - r) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("rank", [84, 20])  # full, and singular as with dead ReLUs
def test_frechet_against_general_square_root(rank):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = random_gaussian(rng, 84, rank), random_gaussian(rng, 84, 84)
    # tr (S_a S_b)^1/2 is the sum of the square roots of the product's eigenvalues, all real and >= 0.
    cross = np.sqrt(linalg.eigvals(a.cov @ b.cov).real.clip(0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov) - 2 * cross
    assert measures.frechet(a, b) == pytest.approx(expected, rel=1e-7)
    assert measures.frechet(a, b) == pytest.approx(measures.frechet(b, a), rel=1e-7)
    # Rounding of a zero eigenvalue, 1e-16 of the largest, comes back as its square root: 1e-8 of the trace.
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-6 * np.trace(a.cov))


def test_pairwise_and_nearest_against_loops():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(50, 1, 4, 4, generator=generator), torch.arange(50) % 5
    found = measures.pairwise(images, labels)
    for c in range(5):  # to 1e-3, because cdist makes the distance of an image to itself about 0.02
        x = images[labels == c]
        d = [(a - b).norm() for i, a in enumerate(x) for b in x[:i]]
        assert found[c] == pytest.approx(float(torch.stack(d).mean()), rel=1e-3)
    assert np.isnan(found[5:]).all()
    distance, index = measures.nearest(images, images.flip(0))
    assert index.tolist() == list(range(49, -1, -1)) and float(distance.max()) < 0.05


def test_natural_labels_have_the_class_frequencies():
    reference, _ = measures.load_reference()
    share = reference["label_counts"] / reference["label_counts"].sum()
    for n in (64, 1_000, 10_000):
        counts = np.bincount(measures.natural_labels(n, reference["label_counts"]), minlength=10)
        assert np.abs(counts - n * share).max() < 4  # a golden-ratio sequence is never further off than O(log n)


def test_classifier_is_good_enough_to_judge():
    assert lenet.load()[1]["accuracy"] >= 0.985
    assert lenet.WEIGHTS.stat().st_size < 500_000


def test_reference_is_of_this_classifier_and_consistent():
    reference, info = measures.load_reference()
    assert info["classifier"] == lenet.load()[1]
    assert reference["label_counts"].sum() == 60_000
    np.testing.assert_allclose((reference["a.mean"] + reference["b.mean"]) / 2, reference["all.mean"], rtol=1e-9, atol=1e-12)
    floors = [measures.floor(reference, n) for n in sorted(measures.FLOOR_SIZES)]
    assert floors == sorted(floors, reverse=True)  # more images, less bias
    a = measures.Gaussian(reference["a.mean"], reference["a.cov"])
    # Eigenvalues that are 0 but for rounding enter as sqrt(eps lambda_max), about 1e-6 in each of 84 dimensions.
    assert measures.frechet(a, measures.half_b(reference)) == pytest.approx(reference["floor.30000"][0], abs=1e-4)

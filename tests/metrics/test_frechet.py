"""The Frechet distance against textbook values and a general matrix square root; moments against numpy's."""

import numpy as np
import pytest
import torch

from fastdiff.metrics import Gaussian, Moments, frechet, gaussian


def random_gaussian(rng, d, rank):
    a = rng.standard_normal((d, rank))
    return Gaussian(rng.standard_normal(d), a @ a.T)


def test_frechet_of_commuting_covariances():
    # Diagonal covariances: |m|^2 + sum (s_a - s_b)^2, the textbook value.
    s, r = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.0])
    a, b = Gaussian(np.zeros(3), np.diag(s**2)), Gaussian(np.array([1.0, 2.0, 2.0]), np.diag(r**2))
    assert frechet(a, b) == pytest.approx(9 + ((s - r) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("rank", [84, 20])  # full, and singular as with dead ReLUs
def test_frechet_against_general_square_root(rank):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = random_gaussian(rng, 84, rank), random_gaussian(rng, 84, 84)
    # tr (S_a S_b)^1/2 is the sum of the square roots of the product's eigenvalues, all real and >= 0.
    cross = np.sqrt(linalg.eigvals(a.cov @ b.cov).real.clip(0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov) - 2 * cross
    assert frechet(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-7)
    # Rounding of a zero eigenvalue, 1e-16 of the largest, comes back as its square root: 1e-8 of the trace.
    assert frechet(a, a) == pytest.approx(0, abs=1e-6 * np.trace(a.cov))


@pytest.mark.parametrize("sizes", [(1, 2, 0, 97), (100,), (50, 50)])
def test_moments_in_batches(sizes):
    """Far from 0, where sums of squares would cancel: within rounding of numpy's two passes."""
    f = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    moments = Moments(5)
    for part in f.split(list(sizes)):
        moments.add(part)
    for got in (moments.gaussian, gaussian(f)):
        np.testing.assert_allclose(got.mean, f.numpy().mean(0), rtol=1e-14)
        # a mean of size 1e4 is known to 1e-12, and enters the covariance times deviations of size 1
        np.testing.assert_allclose(got.cov, np.cov(f.numpy(), rowvar=False), rtol=1e-11, atol=1e-11)


def test_one_image_has_no_covariance():
    moments = Moments(3)
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="n: 1 images have no covariance; give at least 2"):
        _ = moments.gaussian

"""The Frechet distance between Gaussians fitted to features, and the moments it needs, batch by batch."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Gaussian(NamedTuple):
    """What the distance sees of a set of images."""

    mean: np.ndarray  # float64 [d]
    cov: np.ndarray  # float64 [d, d]


class Moments:
    """Mean and covariance of features that arrive in batches; the batches are not kept.

    Two sets of moments are joined by Chan, Golub and LeVeque's update (1979), which does not cancel as raw sums do.
    """

    def __init__(self, width: int):
        self.count = 0
        self._mean, self._scatter = np.zeros(width), np.zeros((width, width))

    def add(self, features: Tensor) -> None:
        """Features [n, d]."""
        f = features.double().cpu().numpy()
        if not len(f):
            return
        mean = f.mean(0)
        centred, apart = f - mean, mean - self._mean
        total = self.count + len(f)
        self._scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * len(f) / total)
        self._mean += apart * (len(f) / total)
        self.count = total

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance over n - 1."""
        if self.count < 2:
            raise ValueError(f"n: {self.count} images have no covariance; give at least 2")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1))


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance (over n - 1) of features [n, d]."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2)  (Dowson and Landau 1982).

    The inner product is symmetric, so two symmetric eigendecompositions do, and singular covariances (dead ReLUs) are no
    trouble, unlike with a general matrix square root.
    """
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.cov @ root).clip(0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)

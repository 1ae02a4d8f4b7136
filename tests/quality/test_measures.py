"""The judges are judged first: exact answers, and real digits measured as if they were generated."""

import measures
import numpy as np
import pytest
import torch

from fastdiff.metrics import Gaussian, frechet


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


def test_classifier_is_good_enough_to_judge():
    assert measures.judging_classifier().info["accuracy"] >= 0.985


def test_reference_is_of_this_classifier_and_consistent():
    reference, info = measures.load_reference()
    assert info["classifier"] == measures.judging_classifier().info
    assert reference["label_counts"].sum() == 60_000
    np.testing.assert_allclose((reference["a.mean"] + reference["b.mean"]) / 2, reference["all.mean"], rtol=1e-9, atol=1e-12)
    floors = [measures.floor(reference, n) for n in sorted(measures.FLOOR_SIZES)]
    assert floors == sorted(floors, reverse=True)  # more images, less bias
    a = Gaussian(reference["a.mean"], reference["a.cov"])
    # Eigenvalues that are 0 but for rounding enter as sqrt(eps lambda_max), about 1e-6 in each of 84 dimensions.
    assert frechet(a, measures.half_b(reference)) == pytest.approx(reference["floor.30000"][0], abs=1e-4)

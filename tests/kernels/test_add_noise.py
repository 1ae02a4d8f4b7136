"""The Triton add_noise against the reference: noise bits, layouts, sizes, types."""

import importlib

import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, check, lay

from fastdiff.ops import seed_tensor
from fastdiff.ops.add_noise import reference
from fastdiff.ops.philox_normal import normal_float32

SEEDS = (0, 2**64 - 1, 5)
# Channels-last tiles need 4 pixels per block: 12 x 20 has them, 5 x 5 has not; 37 channels leave a ragged tile.
SHAPES = ((3, 3, 12, 20), (3, 3, 5, 5), (3, 37, 2, 2), (3, 1, 1, 1))


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.add_noise").add_noise


@pytest.mark.parametrize("layout", [*LAYOUTS[:2], pytest.param("view", marks=pytest.mark.slow)])
def test_noise_bits(launch, device, layout):
    """With the form (0, 1) the result is the noise itself: more than 2^18 values in every layout."""
    x = lay(torch.zeros(3, 32, 48, 58), layout).to(device)
    forms = torch.tensor([0.0, 1.0]).expand(3, 1, 2).to(device)
    made = launch(x, seed_tensor(SEEDS, device), forms, 9, 2)[0]
    assert torch.equal(made.cpu(), normal_float32(seed_tensor(SEEDS), 9, 2, x.shape[1:]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(launch, device, shape, layout, dtype):
    torch.manual_seed(0)
    x, forms = lay(torch.randn(shape).to(dtype), layout), torch.randn(3, 3, 2)
    made = launch(x.to(device), seed_tensor(SEEDS, device), forms.to(device), 1, 2)
    plain = reference(x, seed_tensor(SEEDS), forms, 1, 2)
    truth = reference(x.double(), seed_tensor(SEEDS), forms.double(), 1, 2)
    assert made.is_contiguous()
    check("out", made.cpu(), plain, truth)


@pytest.mark.parametrize("shape", [(3,), (3, 7), (3, 2, 5)], ids=str)
def test_other_ranks_and_float64_coefficients(launch, device, shape):
    x, forms = torch.randn(shape), torch.randn(3, 2, 2, dtype=torch.float64)
    made = launch(x.to(device), seed_tensor(SEEDS, device), forms.to(device), 1, 2)
    truth = reference(x.double(), seed_tensor(SEEDS), forms, 1, 2)
    check("out", made.cpu(), reference(x, seed_tensor(SEEDS), forms, 1, 2), truth)


def test_empty(launch, device):
    x, forms = torch.zeros(3, 4, device=device), torch.zeros(3, 2, 2, device=device)
    assert launch(x[:0], seed_tensor([], device), forms[:0], 0, 2).shape == (2, 0, 4)
    assert launch(x, seed_tensor(SEEDS, device), forms[:, :0], 0, 2).shape == (0, 3, 4)

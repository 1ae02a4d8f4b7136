"""The Triton embedding against float64."""

import importlib
import math

import pytest
import torch
from kernel_checks import DTYPES, check

from fastdiff.ops.embedding import reference

FLOAT32 = 2 * torch.finfo(torch.float32).eps  # as in tests/ops/test_embedding.py


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.embedding").embedding


def inputs(batch, count):
    torch.manual_seed(batch + count)
    return torch.rand(batch) * 1000, 10000.0 ** -torch.linspace(0, 1, count)


@pytest.mark.parametrize("sin_first", [True, False])
@pytest.mark.parametrize("batch, count", [(3, 64), (2, 1), (1, 257), (5, 300), (0, 4), (4, 0)])
def test_values(launch, device, batch, count, sin_first):
    t, f = inputs(batch, count)
    for scale in (1.0, 2 * math.pi):
        got = launch(t.to(device), f.to(device), scale, sin_first, torch.float32).cpu()
        truth = reference(t, f, scale, sin_first, torch.float64)
        assert got.shape == truth.shape and not got.isnan().any()
        assert not got.numel() or (got - truth).abs().max() <= FLOAT32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_t", DTYPES)
def test_types_and_strides(launch, device, of_t, dtype):
    t, f = inputs(10, 42)
    t, f = t.to(of_t)[::2], f.to(torch.bfloat16)[::2]
    args = (1.0, True, dtype)
    truth = reference(t, f, 1.0, True, torch.float64)
    check("embedding", launch(t.to(device), f.to(device), *args).cpu(), reference(t, f, *args), truth, sums=4)


def test_angles_of_every_size(launch, device):
    t = torch.tensor([0.0, -0.0, 1e-30, -1e-6, 0.785398, 1e3, -1e5, 1e8])
    f = torch.tensor([1.0, 0.3, -1.0, 0.7])
    got, truth = (
        launch(t.to(device), f.to(device), 1.0, True, torch.float32).cpu(),
        reference(t, f, 1.0, True, torch.float64),
    )
    assert (got - truth).abs().max() <= FLOAT32
    far = launch(torch.tensor([1e12, -1e20, 3e38]).to(device), f.to(device), 1.0, True, torch.float32).cpu()
    assert far.abs().max() <= 1 + FLOAT32, "beyond float64's digits it still is a sine of something"
    assert launch(torch.tensor([math.inf, math.nan]).to(device), f.to(device), 1.0, True, torch.float32).isnan().all()


def test_strict_refuses_float64(launch, device, monkeypatch):
    t, f = torch.rand(2, dtype=torch.float64, device=device), torch.rand(3, device=device)
    monkeypatch.delenv("FASTDIFF_STRICT", raising=False)
    assert torch.equal(launch(t, f, 1.0, True, torch.float64), reference(t, f, 1.0, True, torch.float64))
    monkeypatch.setenv("FASTDIFF_STRICT", "1")
    with pytest.raises(RuntimeError, match="float64"):
        launch(t, f, 1.0, True, torch.float32)

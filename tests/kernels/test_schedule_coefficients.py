"""The Triton schedule_coefficients against the reference in float64: every law, target and slope."""

import importlib
import itertools

import pytest
import torch

from fastdiff.ops.schedule_coefficients import Law, Target, reference

EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.schedule_coefficients").schedule_coefficients


def times(law):
    if law == Law.TABLE:
        return torch.tensor([0, 0.5, 10.25, 98.5, 99, -3, 1005, torch.nan]).double()
    if law == Law.LOG_SNR:
        return torch.linspace(-30, 30, 11).double()
    return torch.cat((torch.linspace(1e-3, 0.999, 70), torch.tensor([1e-6]))).double()


def compare(got, want):
    """float64 to the rounding of a dozen operations; c_out and log SNR pass through 0."""
    torch.testing.assert_close(got.cpu(), want, rtol=256 * EPS, atol=256 * EPS, equal_nan=True)


@pytest.mark.parametrize("law, target", list(itertools.product(Law, Target)), ids=lambda v: v.name)
def test_values(launch, device, law, target):
    t = times(law)
    table = -(torch.linspace(0.01, 3, 100, dtype=torch.float64) ** 2) if law == Law.TABLE else None
    for raw, slopes in ((False, False), (False, True), (True, target == Target.EDM)):
        rest = (int(law), int(target), 0.5, 20.0, 0.4, 0.0, 999.0, raw, slopes, torch.float64)
        compare(launch(t.to(device), None if table is None else table.to(device), *rest), reference(t, table, *rest))


def test_the_models_own_boundary(launch, device):
    """A consistency model returns x at its smallest noise: c_out is 0 there, bit for bit."""
    t = torch.tensor([0.002, 0.002, 80.0], dtype=torch.float64, device=device)
    c = launch(t, None, int(Law.VE), int(Target.EDM), 0.0, 0.0, 0.5, 0.002, 1.0, False, False, torch.float64)
    assert c[:2, 3].tolist() == [1, 1] and c[:2, 4].tolist() == [0, 0]


@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
def test_extremes(launch, device, law):
    """At alpha = 0, sigma = 0 and far outside nothing is wrong but what has to be infinite."""
    t = torch.tensor({Law.LOG_SNR: [-700.0, 700.0], Law.TRIG: [0.0, 1.5]}.get(law, [0.0, 1.0])).double()
    table = torch.tensor([0.0, -50.0], dtype=torch.float64) if law == Law.TABLE else None
    rest = (int(law), int(Target.V), 0.5, 20.0, 0.4, 0.0, 1.0, False, False, torch.float64)
    compare(launch(t.to(device), None if table is None else table.to(device), *rest), reference(t, table, *rest))


def test_shapes_and_types(launch, device):
    rest = (int(Law.VP), int(Target.EPS), 0.1, 20.0, 0.5, 0.0, 1.0, False, False, torch.float32)
    t = torch.rand(5, 6, 7).transpose(0, 2).bfloat16()
    got = launch(t.to(device), None, *rest).cpu()
    assert got.shape == (7, 6, 5, 7) and got.dtype == torch.float32
    # rounded once, so at most one unit in the last place apart where float64 differs in its last
    torch.testing.assert_close(got, reference(t, None, *rest), rtol=torch.finfo(torch.float32).eps, atol=0)
    assert launch(torch.zeros(0, device=device), None, *rest).shape == (0, 7)

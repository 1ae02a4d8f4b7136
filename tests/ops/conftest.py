"""Shared by the op tests: poisoned memory, every instruction set of this machine, the derived tolerance."""

import pytest
import torch

import fastdiff.ops  # noqa: F401  (registers the ops)

try:
    from fastdiff import _C
except ImportError:
    _C = None


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty, in Python and in C++, is full of NaN: a result that is not wholly written does not pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=_C.isas() if _C else ["none"])
def isa(request):
    """Runs the test once with the kernels of each instruction set that this machine has."""
    if _C is None:
        pytest.skip("fastdiff._C is not built (FASTDIFF_BUILD=none)")
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def accurate(got, plain, truth, floor=0.0):
    """max |got - truth| <= 2 max |plain - truth| + rounding floor.

    plain: plain PyTorch in the same dtype; truth: float64. The floor is half a unit in the last place of the result's
    dtype at the largest value, and four float32 units there for what was computed in float32; `floor` adds the
    condition of the problem where that is worse.
    """
    assert got.shape == truth.shape and got.dtype == plain.dtype, (got.shape, truth.shape, got.dtype, plain.dtype)
    if not truth.numel():
        return
    largest = truth.abs().max().item()
    working = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    floor += largest * (torch.finfo(got.dtype).eps + 4 * working)
    error, allowed = (got.double() - truth).abs().max().item(), 2 * (plain.double() - truth).abs().max().item() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, largest value {largest:.3g}"


@pytest.fixture(name="accurate")
def accurate_fixture():
    return accurate

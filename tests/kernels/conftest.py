"""The launchers on a GPU where there is one, else under Triton's interpreter, with nothing left over for other tests."""

import pytest
import torch
from interpreter import HAS_GPU, WHY_NOT


@pytest.fixture
def device():
    """Where the launchers run: "cuda", or "cpu" under the interpreter."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty and its kin come full of NaN, so that an element no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)

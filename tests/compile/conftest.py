"""Shared by the tests of compiled programs: poisoned memory, networks of every kind."""

import pytest
import torch
from compiled_networks import NETWORKS, model_of
from tiny import awake


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is full of NaN: a result that is not wholly written does not pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=NETWORKS)
def network(request):
    return awake(NETWORKS[request.param])


@pytest.fixture
def model():
    """A small model of three classes whose network a program can compute."""
    return model_of("adm")

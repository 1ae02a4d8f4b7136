"""The recorded networks as a fixture; this folder on the path, for its helper modules."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from recorded_networks import Recorded, recorded


@pytest.fixture(scope="session")
def case():
    cache: dict[str, Recorded] = {}

    def get(name: str) -> Recorded:
        return cache.setdefault(name, recorded(name))

    return get


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield

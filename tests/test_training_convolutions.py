"""What computes convolutions while a network learns: Winograd's algorithm, chosen by their shape and nothing else."""

import pytest
import torch
from torch.nn import functional

from fastdiff import ops
from fastdiff.nn import TRAINING, Conv2d

pytestmark = pytest.mark.skipif(len(ops.conv3x3_algorithms(torch.float32)) == 1, reason="fastdiff._C is not built")


@pytest.fixture
def called(monkeypatch):
    """The algorithms that `ops.conv3x3` is asked for."""
    algorithms, original = [], ops.conv3x3

    def spy(*args, **options):
        algorithms.append(options["algorithm"])
        return original(*args, **options)

    monkeypatch.setattr(ops, "conv3x3", spy)
    return algorithms


def test_wide_layers_that_learn(called):
    torch.manual_seed(0)
    layer, x = Conv2d(32, 48), torch.randn(3, 32, 8, 8, requires_grad=True)
    y = layer(x)
    assert called == [TRAINING]
    want = functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(y)
    given = (x, layer.weight, layer.bias)
    for one, two in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(want, given, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(Conv2d(3, 64), id="few inputs"),
        pytest.param(Conv2d(64, 3), id="few outputs"),
        pytest.param(Conv2d(32, 32, stride=2), id="halving"),
        pytest.param(Conv2d(32, 32, kernel=1), id="1x1"),
        pytest.param(Conv2d(32, 32).double(), id="float64"),
        pytest.param(Conv2d(32, 32).requires_grad_(False), id="frozen"),
    ],
)
def test_layers_left_to_the_library(layer, called):
    layer(torch.randn(2, layer.in_channels, 8, 8, dtype=layer.weight.dtype))
    assert not called


def test_neither_without_gradients_nor_under_autocast(called):
    layer, x = Conv2d(32, 32), torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert not called


@pytest.mark.slow
def test_compiles_as_one_graph():
    """Forward and backward, with the same gradient."""
    torch.manual_seed(0)
    layer, x = Conv2d(32, 32), torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    want = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)

"""What computes convolutions while a network learns: Winograd's algorithm, chosen by their shape and nothing else."""

import pytest
import torch
from torch.nn import functional

from fastdiff import layers, ops
from fastdiff.layers import TRAINING, Conv2d

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


def test_not_without_gradients(called):
    layer, x = Conv2d(32, 32), torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        layer(x)
    assert not called


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_under_autocast(called, given, monkeypatch):
    """Types are those of the library under autocast, errors no larger."""
    torch.manual_seed(0)
    layer = Conv2d(64, 48)
    x = torch.randn(9, 64, 9, 7).to(given).requires_grad_()
    truth = functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    dy = torch.randn_like(truth).bfloat16()
    inputs = (x, layer.weight, layer.bias)
    exact = [truth, *torch.autograd.grad(truth, inputs, dy.double())]

    def measured():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        got = [y, *torch.autograd.grad(y, inputs, dy)]
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]
        return [t.dtype for t in got], errors

    monkeypatch.setattr(layers, "MATRIX_UNIT", True)
    types, errors = measured()
    assert not called
    monkeypatch.setattr(layers, "MATRIX_UNIT", False)
    assert measured()[0] == types
    assert called == [TRAINING]
    assert all(mine <= 1.1 * library for mine, library in zip(measured()[1], errors, strict=True))


def test_few_pixels_under_autocast(called):
    """There packing would cost more than it gains."""
    with torch.autocast("cpu", torch.bfloat16):
        Conv2d(64, 64)(torch.randn(7, 64, 8, 8))
    assert not called


@pytest.mark.slow
def test_compiles_as_one_graph():
    """Forward and backward, with the same gradient."""
    torch.manual_seed(0)
    layer, x = Conv2d(32, 32), torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    want = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), layer.weight)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)

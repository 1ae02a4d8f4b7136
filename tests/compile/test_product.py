"""Small convolutions as products of matrices: the convolution's values, and an image's bits in every batch."""

import pytest
import torch
from torch.nn import functional

from fastdiff.compile.library import LibraryConvolution
from fastdiff.compile.product import SMALL, Product, convolution

CASES = {
    "1x1": (1, 1, 0),
    "1x1 of stride 2": (1, 2, 0),
    "3x3": (3, 1, 1),
    "halving": (3, 2, 1),
    "halving, zeros at the end": (3, 2, 0),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(("inputs", "outputs", "size"), [(16, 32, (8, 8)), (48, 16, (7, 9)), (5, 1, (4, 6))])
@torch.inference_mode()
def test_values_and_bits(kind, inputs, outputs, size):
    kernel, stride, padding = CASES[kind]
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs, kernel, kernel), torch.randn(outputs)
    x = torch.randn(5, inputs, *size).contiguous(memory_format=torch.channels_last)
    product, library = (make(weight, bias, stride, padding) for make in (Product, _library(size)))
    y = product(x)
    exact = functional.conv2d(x.double(), weight.double(), bias.double(), stride, padding)
    terms = 1 + inputs * kernel * kernel  # each rounded, in any order
    bound = functional.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), stride, padding)
    for found in (y, library(x)):
        assert found.shape == exact.shape and ((found - exact).abs() <= terms * 2**-24 * bound).all()
    assert y.is_contiguous(memory_format=torch.channels_last)
    for first, count in ((0, 1), (1, 3), (4, 1)) if outputs > 1 else ():
        part = x[first : first + count].clone(memory_format=torch.preserve_format)
        assert torch.equal(product(part), y[first : first + count])
    assert product(x[:0]).shape == y[:0].shape


def _library(size):
    return lambda weight, bias, stride, padding: LibraryConvolution(weight, bias, size, stride, padding)


def test_which_are_small():
    """Decided by the shape alone; other types, and channels that leave images unaligned, have the library's."""
    weight, bias = torch.ones(64, 64, 1, 1), torch.zeros(64)
    edge = int((SMALL / (2 * 64 * 64)) ** 0.5)
    assert isinstance(convolution(weight, bias, (edge, edge), 1, 0), Product)
    assert isinstance(convolution(weight, bias, (edge + 1, edge + 1), 1, 0), LibraryConvolution)
    assert isinstance(convolution(weight.bfloat16(), bias, (edge, edge), 1, 0), LibraryConvolution)
    assert isinstance(convolution(weight[:24], bias[:24], (4, 4), 1, 0), LibraryConvolution)
    assert isinstance(convolution(weight, bias, (2 * edge, 2 * edge), 2, 0), Product)

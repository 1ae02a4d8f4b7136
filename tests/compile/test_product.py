"""Convolutions by matrix products and by the library: values, bits in every batch, processors without bfloat16."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from fastdiff.compile import library
from fastdiff.compile.library import LibraryConvolution
from fastdiff.compile.product import SMALL, Product, Projection, convolution

try:
    from fastdiff import _C
except ImportError:  # nothing was compiled
    _C = None

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
    others = [Projection(weight, bias)] if (kind, outputs % 16) == ("1x1", 0) else []
    for found in (y, library(x), *(other(x) for other in others)):
        assert found.shape == exact.shape and ((found - exact).abs() <= terms * 2**-24 * bound).all()
    assert y.is_contiguous(memory_format=torch.channels_last)
    for first, count in ((0, 1), (1, 3), (4, 1)) if outputs > 1 else ():
        part = x[first : first + count].clone(memory_format=torch.preserve_format)
        assert torch.equal(product(part), y[first : first + count])
    assert product(x[:0]).shape == y[:0].shape


def _library(size):
    return lambda weight, bias, stride, padding: LibraryConvolution(weight, bias, size, stride, padding)


def test_which_are_small():
    """Decided by the shape alone; other types, and channels that leave images unaligned, have the library's.

    Large ones of 1x1 have a kernel of ours where it is built.
    """
    weight, bias = torch.ones(64, 64, 1, 1), torch.zeros(64)
    edge = int((SMALL / (2 * 64 * 64)) ** 0.5)
    assert isinstance(convolution(weight, bias, (edge, edge), 1, 0), Product)
    large = Projection if _C else LibraryConvolution
    assert isinstance(convolution(weight, bias, (edge + 1, edge + 1), 1, 0), large)
    for other in (
        (weight, bias, (99, 99), 2, 0),
        (torch.ones(64, 64, 3, 3), bias, (99, 99)),
        (weight[:24], bias[:24], (99, 99), 1, 0),
    ):
        assert isinstance(convolution(*other), LibraryConvolution)
    assert isinstance(convolution(weight.bfloat16(), bias, (edge, edge), 1, 0), LibraryConvolution)
    assert isinstance(convolution(weight[:24], bias[:24], (4, 4), 1, 0), LibraryConvolution)
    assert isinstance(convolution(weight, bias, (2 * edge, 2 * edge), 2, 0), Product)


@torch.inference_mode()
def test_bfloat16_that_the_library_does_not_serve(monkeypatch):
    """In float32, whatever is behind it: a result is rounded once."""
    monkeypatch.setattr(library, "orders", lambda dtype: dtype != torch.bfloat16)
    weight, bias = torch.randn(8, 16, 3, 3).bfloat16(), torch.randn(3, 8)
    x, residual = torch.randn(3, 16, 6, 5).bfloat16(), torch.randn(3, 8, 6, 5).bfloat16()
    for images in (1, 3):
        y = LibraryConvolution(weight, bias[0], (6, 5))(x[:images], bias[:images], residual[:images], 0.5)
        exact = functional.conv2d(x[:images].double(), weight.double(), padding=1) + bias[:images, :, None, None].double()
        exact = (exact + residual[:images].double()) / 2
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


SAMPLED = """
import fastdiff
model = fastdiff.load("mnist-ect")
plain = fastdiff.sample(model, 2, seeds=[0, 1], compile="off")
high = fastdiff.sample(model, 2, seeds=[0, 1], compile="fast", quality="high")
print(((high - plain).norm() / plain.norm()).item())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_the_class_of_bfloat16_on_processors_without_it(isa):
    """All three libraries held to what such a processor has."""
    if _C is None or isa not in _C.isas():
        pytest.skip(f"no native code for {isa} here")
    limits = {"avx2": ("AVX2", "avx2"), "avx512": ("AVX512_CORE", "avx512")}[isa]
    held = {"ONEDNN_MAX_CPU_ISA": limits[0], "ATEN_CPU_CAPABILITY": limits[1], "FASTDIFF_ISA": isa, "FASTDIFF_CACHE": "off"}
    run = subprocess.run([sys.executable, "-c", SAMPLED], env=os.environ | held, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert 0 < float(run.stdout) < 0.03

"""conv1x1 against oneDNN with weights in its own order, and PyTorch's convolution; weights cold, as in a network."""

import pytest
import torch
from bench_conv3x3 import cold
from harness import DEVICE, with_full
from torch.nn import functional

from fastdiff import ops
from fastdiff.compile.library import LibraryConvolution

CASES = [  # N, I, O, H = W: skips of the DDPM and EDM CIFAR-10 nets and of ADM's ImageNet-64
    (1, 512, 256, 32),
    (1, 512, 256, 16),
    (1, 512, 256, 8),
    (1, 128, 256, 32),
    (1, 384, 192, 64),
    (1, 960, 384, 32),
    (8, 512, 256, 32),
]


def name_of(case) -> str:
    n, inputs, outputs, side = case
    return f"{n}x{inputs} to {outputs} {side}x{side} float32"


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere it is PyTorch's product")
@pytest.mark.parametrize("case", with_full(CASES, CASES[:3]), ids=name_of)
@torch.inference_mode()
def test_conv1x1(compare, case):
    n, inputs, outputs, side = case
    torch.manual_seed(0)
    x = torch.randn(n, inputs, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 1, 1) / inputs**0.5, torch.randn(outputs)
    library = LibraryConvolution(weight, bias, (side, side), 1, 0)

    def onednn(packed):
        library.weight = packed
        return library(x)

    variants = {
        "fastdiff": cold(lambda packed: ops.conv1x1(x, packed, bias), ops.conv1x1_pack(weight.flatten(1))),
        "onednn": cold(onednn, library.weight),
        "pytorch": cold(lambda w: functional.conv2d(x, w, bias), weight),
    }

    def check():
        exact = functional.conv2d(x.double(), weight.double(), bias.double())
        bound = functional.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs())
        for name, run in variants.items():
            assert ((run() - exact).abs() <= (inputs + 2) * 2.0**-24 * bound).all(), name  # every sum's roundings

    compare("conv1x1", name_of(case), variants, check, flops=2 * x.numel() * outputs)

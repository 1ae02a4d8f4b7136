"""Dropout on a CPU: units dropped by counter-based noise, from one number of PyTorch's generator."""

import copy

import pytest
import torch
from torch import nn

from fastdiff.layers import Dropout
from fastdiff.training.losses.base import same_dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(4, 64, 33, 31, dtype=dtype)
    y = Dropout(p)(x)
    kept = y != 0
    assert y.dtype == dtype and set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * sigma
    for dim in range(4):  # neighbours are independent
        pairs = kept.narrow(dim, 1, kept.shape[dim] - 1) & kept.narrow(dim, 0, kept.shape[dim] - 1)
        assert abs(pairs.double().mean().item() - (1 - p) ** 2) < 10 * sigma


def test_a_mask_follows_the_generator_not_the_layout():
    layer, x = Dropout(0.3), torch.randn(2, 6, 5, 4)
    masks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(7)
        masks.append(layer(x.contiguous(memory_format=layout)))
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=0)
    assert not torch.equal(layer(x), layer(x))
    with same_dropout(x):
        first = layer(x)
    assert torch.equal(layer(x), first)


def test_gradient_is_the_mask():
    x = torch.ones(1, 3, 8, 8, requires_grad=True)
    y = Dropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing_and_evaluation(p):
    x = torch.randn(1, 3, 4, 4)
    layer = Dropout(p)
    assert torch.equal(layer(x), nn.Dropout(p)(x))
    assert torch.equal(copy.deepcopy(layer).eval()(x), x)

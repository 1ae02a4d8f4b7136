"""The Triton group_norm_attention against the float64 reference."""

import importlib

import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, check, lay

from fastdiff.ops.group_norm_attention import reference

# (x's shape, E, heads, groups): whole tiles; 7 x 7 pixels in 4 heads; one pixel; odd channels, heads of 5 and E unlike C;
# several tiles of queries, keys and features; a head wider than one program sums (chunks of q, programs for v).
CASES = (
    ((2, 32, 8, 8), 32, 1, 8),
    ((2, 32, 7, 7), 64, 4, 8),
    ((3, 24, 1, 1), 24, 2, 6),
    ((2, 6, 3, 21), 15, 3, 2),
    ((1, 40, 9, 8), 72, 2, 4),
    ((1, 16, 4, 3), 264, 1, 8),
)


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.group_norm_attention").group_norm_attention


def arguments(shape, inner, heads, groups, layout, dtype, biases=True):
    """x far from 0, so that a one-pass variance would show; scores of a standard deviation of about 3."""
    torch.manual_seed(0)
    c = shape[1]
    x = lay((2 * torch.randn(shape) + 5).to(dtype), layout)
    qkv, out = torch.randn(3 * inner, c) * (3 / c) ** 0.5, torch.randn(c, inner) * inner**-0.5
    qkv_bias, out_bias = (torch.randn(3 * inner), torch.randn(c)) if biases else (None, None)
    norm = [1 + torch.randn(c) / 4, torch.randn(c), groups, 1e-5]
    return [x, *norm, qkv.to(dtype), qkv_bias, out.to(dtype), out_bias, heads, (inner / heads) ** -0.5, 0.7, None]


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def to(args, device):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def rounded(args):
    """Plain PyTorch with every intermediate in the type of x, as the modules compute it."""
    x, weight, bias, groups, eps, qkv, qkv_bias, out, out_bias, heads, scale, out_scale, _ = args
    n = len(x)
    biases = [None if b is None else b.to(x.dtype) for b in (qkv_bias, out_bias)]
    h = torch.nn.functional.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    rows = torch.nn.functional.linear(h.flatten(2).mT, qkv, biases[0])
    q, k, v = rows.reshape(n, -1, 3, heads, out.shape[1] // heads).permute(2, 0, 3, 1, 4).unbind(0)
    a = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).permute(0, 2, 1, 3).flatten(2)
    return (x + torch.nn.functional.linear(a, out, biases[1]).mT.reshape(x.shape)) * out_scale


def grid():
    """Every layout of every case, each in another type from case to case: the interpreter takes seconds for one."""
    for i, case in enumerate(CASES):
        for j, layout in enumerate(LAYOUTS):
            dtype = DTYPES[(i + j) % len(DTYPES)]
            yield pytest.param(case, layout, dtype, id=f"{case}-{layout}-{dtype}")


@pytest.mark.parametrize(("case", "layout", "dtype"), list(grid()))
def test_forward(launch, device, case, layout, dtype):
    args = arguments(*case, layout, dtype)
    y, stats = launch(*to(args, device))
    truth, true_stats = reference(*wide(args))
    terms = args[0][0].numel() // case[3]
    check("y", y.cpu(), rounded(args), truth, terms)
    check("stats", stats.cpu(), reference(*args)[1], true_stats, terms)
    assert y.stride() == torch.empty_like(args[0]).stride()


def test_without_biases_and_with_statistics(launch, device):
    args = arguments((2, 8, 4, 4), 16, 2, 2, "channels_last", torch.float32, biases=False)
    check("y", launch(*to(args, device))[0].cpu(), rounded(args), reference(*wide(args))[0], 64)
    args[-1] = reference(*args)[1] + 0.5
    y, stats = launch(*to(args, device))
    check("y, stats given", y.cpu(), reference(*args)[0], reference(*wide(args))[0], 64)
    assert torch.equal(stats.cpu(), args[-1])


def test_statistics_in_chunks(launch, device):
    """A group of several tiles, which several programs share."""
    args = arguments((1, 8, 48, 48), 16, 1, 1, "contiguous", torch.float32)
    statistics = importlib.import_module("fastdiff.kernels.group_norm_attention").statistics
    got, truth = statistics(args[0].to(device), 1).cpu(), reference(*wide(args))[1]
    check("stats", got, reference(*args)[1], truth, args[0].numel())


@pytest.mark.parametrize("scale", [-0.5, 0.0, 40.0])
def test_any_scale(launch, device, scale):
    args = arguments((1, 16, 5, 9), 16, 2, 4, "contiguous", torch.float32)
    args[10] = scale
    check("y", launch(*to(args, device))[0].cpu(), reference(*args)[0], reference(*wide(args))[0], 4096)


def test_nan_stays_in_its_sample(launch, device):
    args = arguments((2, 8, 4, 4), 16, 2, 2, "contiguous", torch.float32)
    args[0][0, 3, 2, 1] = float("nan")
    y = launch(*to(args, device))[0]
    assert y[0].isnan().all() and not y[1].isnan().any()


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)], ids=str)
def test_empty(launch, device, shape):
    args = arguments(shape, 8, 2, 4, "contiguous", torch.float32)
    y, stats = launch(*to(args, device))
    assert y.shape == shape and stats.shape == (shape[0], 4, 2)

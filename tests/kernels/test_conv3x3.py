"""The Triton conv3x3 by "fp8" against the float64 reference, which rounds to eight bits as the kernel does.

What rounds a float32 that is computed in another order may fall on the other side of the middle between two neighbours: the
tolerance moves by one neighbour exactly the elements of h where float32's error reaches that middle, and no other.
"""

import importlib

import pytest
import torch
from kernel_checks import LAYOUTS, check, lay
from torch.nn import functional

from fastdiff.ops import Norm, _fp8, conv3x3_pack
from fastdiff.ops.conv3x3 import reference
from fastdiff.ops.group_norm_silu import reference as norm_reference

# n, inputs, outputs, height, width, groups of x, groups of y: moments in the epilogue; several samples a tile; odd channels,
# sides and groups, a tile cut short; one pixel; more outputs than a tile, blocks of 64.
CASES = (
    (2, 32, 64, 16, 16, 4, 16),
    (3, 16, 24, 5, 7, 2, 4),
    (2, 21, 6, 3, 13, 3, 2),
    (1, 8, 16, 1, 1, 2, 0),
    (1, 192, 132, 8, 16, 32, 11),
)


@pytest.fixture
def launch(device):
    if device == "cuda" and not _fp8.served(torch.device(device)):
        pytest.skip("this GPU multiplies no E4M3")
    return importlib.import_module("fastdiff.kernels.conv3x3").conv3x3


def arguments(case, layout="channels_last", dtype=torch.bfloat16, everything=True):
    n, inputs, outputs, height, width, groups, stats_groups = case
    torch.manual_seed(1)
    x = lay((2 * torch.randn(n, inputs, height, width) + 3).to(dtype), layout)
    weight = torch.randn(outputs, inputs, 3, 3) * torch.rand(outputs, 1, 1, 1) / (9 * inputs) ** 0.5
    gamma, beta = 1 + torch.randn(inputs) / 4, torch.randn(inputs)
    packed = conv3x3_pack(weight, "fp8", norm=Norm(gamma, beta, groups))
    norm = [gamma, beta, groups, 1e-5, *(torch.randn(n, inputs) / 4 if everything else None for _ in range(3)), None, True]
    bias = torch.randn(n, outputs) if everything else None
    residual = lay(torch.randn(n, outputs, height, width).to(dtype), layout) if everything else None
    return [x, weight, bias, *norm, residual, 0.7 if everything else 1.0, stats_groups, packed, "fp8"]


def wide(args):
    """float64, but for what is packed."""
    return [a.double() if isinstance(a, torch.Tensor) and a.dtype != torch.float8_e4m3fn else a for a in args]


def to(args, device):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def hidden(args):
    """f h in float64 and what float32 may err by in it.

    Two passes over a group, the affine map, an exponential and a division: some 16 roundings of what is added up.
    """
    x, factor = args[0].double(), _fp8.tails(args[15])[0, 1].double()
    h = norm_reference(x, *wide(args[3:12]))[0] * factor
    parts = norm_reference(x.abs(), *(a.abs() if isinstance(a, torch.Tensor) else a for a in wide(args[3:11])), False)[0]
    return h, 16 * torch.finfo(torch.float32).eps * (h.abs() + (1 + parts.abs()) * factor)


def neighbours(args):
    """[N, O, H, W]: what z may move by where f h lies within float32's error of the middle between two E4M3 numbers."""
    packed, (h, error) = args[15], hidden(args)
    scale, factor = (t.double() for t in _fp8.tails(packed).unbind(1))
    apart = _fp8.e4m3(h + error).double() - _fp8.e4m3(h - error).double()
    assert (apart != 0).double().mean() < 1e-3, "too much of h is undecided for a test"
    q = packed[:, : -_fp8.TAIL].reshape(len(packed), 3, 3, -1)[..., : h.shape[1]].double().permute(0, 3, 1, 2)
    return functional.conv2d(apart, q.abs(), padding=1) * (scale / factor)[:, None, None]


def check_all(launch, device, args):
    y, stats, of_x = launch(*to(args, device))
    truth, true_stats, true_of_x = reference(*wide(args))
    plain, plain_stats, plain_of_x = reference(*args)
    more = neighbours(args) * abs(args[13])
    assert y.stride() == plain.stride() and not y.isnan().any()
    largest = truth.abs().max().item()
    floor = largest * (torch.finfo(y.dtype).eps / 2 + torch.finfo(torch.float32).eps * (9 * args[0].shape[1]) ** 0.5)
    error, usual = (((t.cpu().double() - truth).abs() - more).max().item() for t in (y, plain))
    assert error <= 2 * max(usual, 0) + floor, f"error {error:.3g}, plain {usual:.3g}, floor {floor:.3g}"
    check("stats of x", of_x.cpu(), plain_of_x, true_of_x, 4096)
    if args[14]:  # of y before it is rounded, and plain of y as it is
        worth = torch.finfo(y.dtype).eps * largest + more.max().item()
        check("stats of y", stats.cpu(), plain_stats, true_stats, 4096, worth * (1 + 2 * largest))
    else:
        assert stats.shape == (len(args[0]), 0, 2)


def grid():
    for i, case in enumerate(CASES):
        for j, layout in enumerate(LAYOUTS):
            dtype = (torch.bfloat16, torch.float16)[(i + j) % 2]
            yield pytest.param(case, layout, dtype, id=f"{case}-{layout}-{dtype}")


@pytest.mark.parametrize(("case", "layout", "dtype"), list(grid()))
def test_values(launch, device, case, layout, dtype):
    check_all(launch, device, arguments(case, layout, dtype))


def test_convolution_alone(launch, device):
    check_all(launch, device, arguments(CASES[0], everything=False))
    args = arguments(CASES[1], everything=False)
    args[2] = torch.randn(24)
    check_all(launch, device, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [False, True], ids=["", "statistics given"])
def test_eight_bits_of_h(launch, device, layout, given):
    """Every element that float32's error leaves decided has the reference's bits; the others one of two."""
    args = arguments((2, 48, 8, 12, 12, 4, 0), layout)
    if given:
        args[10] = norm_reference(*wide(args[:1] + args[3:12]))[1].float()
    x, factor = args[0].to(device), _fp8.tails(args[15])[0, 1:].to(device)
    h = torch.empty(x.shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    norm = to(args[3:12], device)
    importlib.import_module("fastdiff.kernels.group_norm_silu").normalise(h, x, *norm, factor)
    wanted, error = hidden(args)
    low, high = (_fp8.e4m3(wanted + e).float() for e in (-error, error))
    assert ((h.cpu().float() == low) | (h.cpu().float() == high)).all()


def test_saturation_and_nan(launch, device):
    """Beyond 448 / f h is 448 / f, and a NaN stays in its sample."""
    args = arguments((2, 16, 16, 16, 16, 4, 0), everything=False)
    args[8] = torch.full((2, 16), 200.0)
    h, _ = hidden(args)
    assert (h > 448).any()
    y = launch(*to(args, device))[0].cpu()
    truth = reference(*wide(args))[0]
    assert (y.double() - truth).abs().max() <= 2**-7 * truth.abs().max()
    args[0][0, 3, 2, 1] = float("nan")
    y = launch(*to(args, device))[0].cpu()
    assert y[0].isnan().any() and not y[1].isnan().any()


def test_an_image_does_not_depend_on_its_batch(launch, device):
    """Nor do its statistics: to the bit."""
    args = to(arguments((3, 32, 32, 16, 16, 4, 8)), device)
    y, stats, _ = launch(*args)
    alone = [a[1:2] if isinstance(a, torch.Tensor) and len(a) == 3 else a for a in args]
    again = launch(*alone)
    assert torch.equal(again[0], y[1:2]) and torch.equal(again[1], stats[1:2])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
def test_empty(launch, device, shape):
    args = arguments((2, 16, 8, 4, 4, 4, 4))
    args[0] = torch.empty(2, 16, *shape, dtype=torch.bfloat16)
    args[12] = torch.empty(2, 8, *shape, dtype=torch.bfloat16)
    y, stats, _ = launch(*to(args, device))
    assert y.shape == (2, 8, *shape) and stats.shape == (2, 4, 2)


def test_direct_is_composed(launch):
    args = arguments(CASES[1])
    args[15], args[16] = None, "direct"
    for got, wanted in zip(launch(*args), reference(*args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_misuse_is_refused(launch, device):
    args = to(arguments(CASES[0]), device)
    for position, value, words in (
        (3, None, "algorithm: 'fp8' needs a norm"),
        (0, args[0].double(), "not torch.float64"),
        (15, None, "packed: expected contiguous E4M3"),
        (15, args[15][:-1], "pack again"),
        (15, args[15].float(), "pack again"),
    ):
        with pytest.raises(ValueError, match=words):
            launch(*args[:position], value, *args[position + 1 :])

"""The Triton group_norm_silu and its backward against the float64 reference."""

import importlib

import covering
import norm_cases
import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, check, lay

from fastdiff.ops.group_norm_silu import reference, reference_backward

# (shape, groups): on chip; odd channels, groups and pixels; one pixel; no pixels' dimension; one wide group; streamed, in
# chunks, with six channels per group, or with a group wider than a tile.
CASES = (
    ((2, 32, 8, 8), 8),
    ((3, 6, 5, 7), 2),
    ((1, 24, 1, 1), 6),
    ((4, 20), 5),
    ((2, 600, 4, 4), 1),
    ((1, 24, 64, 49), 4),
    ((1, 160, 33, 16), 1),
)


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.group_norm_silu").group_norm_silu


@pytest.fixture
def launch_backward(device):
    return importlib.import_module("fastdiff.kernels.group_norm_silu_backward").group_norm_silu_backward


def arguments(shape, groups, layout, dtype, absent=None, silu=True):
    """x far from 0, so that a one-pass variance would show; one of add, scale and shift may be absent."""
    torch.manual_seed(0)
    n, c = shape[:2]
    x = (2 * torch.randn(shape) + 5).to(dtype)
    x = lay(x, layout) if len(shape) == 4 else x
    extras = [None if name == absent else torch.randn(n, c) for name in ("add", "scale", "shift")]
    return [x, torch.randn(c), torch.randn(c), groups, 1e-5, *extras, None, silu]


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def to(args, device):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def grid():
    """Every layout of the small cases, each in another type from case to case, all of them in the slow tests; the streamed
    ones, slow in the interpreter, in the networks' layouts.
    """
    for i, (shape, groups) in enumerate(CASES):
        for j, layout in enumerate(LAYOUTS if len(shape) == 4 else ("contiguous",)):
            for k, dtype in enumerate(DTYPES):
                network = (layout, dtype) in (("contiguous", torch.float32), ("channels_last", torch.bfloat16))
                slow = () if i >= 5 or (i + j + k) % 3 == 0 else pytest.mark.slow
                if i < 5 or network:
                    yield pytest.param(shape, groups, layout, dtype, marks=slow, id=f"{shape}-{groups}-{layout}-{dtype}")


GRID = list(grid())


@pytest.mark.parametrize(("shape", "groups", "layout", "dtype"), GRID)
def test_forward(launch, device, shape, groups, layout, dtype):
    args = arguments(shape, groups, layout, dtype)
    y, stats = launch(*to(args, device))
    plain, plain_stats = reference(*args)
    truth, true_stats = reference(*wide(args))
    terms = args[0][0].numel() // groups
    check("y", y.cpu(), plain, truth, terms)
    check("stats", stats.cpu(), plain_stats, true_stats, terms)
    assert y.stride() == plain.stride()
    args[8] = plain_stats
    check("y, stats given", launch(*to(args, device))[0].cpu(), plain, truth, terms)


@pytest.mark.parametrize(("shape", "groups", "layout", "dtype"), GRID)
def test_backward(launch_backward, device, shape, groups, layout, dtype):
    args = arguments(shape, groups, layout, dtype)
    args[8] = reference(*args)[1]
    exact = wide(args)
    exact[8] = reference(*wide(args)[:8], None, True)[1]
    dy = lay(torch.randn(shape), layout).to(dtype) if len(shape) == 4 else torch.randn(shape).to(dtype)
    ours = launch_backward(dy.to(device), *to(args, device))
    plain = reference_backward(dy, *args)
    truth = reference_backward(dy.double(), *exact)
    names = ("dx", "dw", "db", "dadd", "dscale", "dshift")
    for name, a, p, t in zip(names, ours, plain, truth, strict=True):
        check(name, a.cpu(), p, t, args[0].numel() // groups)


# The interpreter takes a second for 2^18 elements.
FEWER = {
    "groups": [1, 8, 32, "C"],
    "size": [(1, 1), (7, 5), (8, 8), (64, 64)],
    "given": ["", "add", "add scale shift", "scale stats"],
}
FEWEST = {"channels": [1, 3, 32, 64, 96, 192, 320, 576, 1024], "given": ["", "add scale shift", "scale stats"]}


def covered(parameters, most, programs):
    """At most so many elements, and groups of all samples: the interpreter's time."""

    def valid(case):
        groups = case["batch"] * (case["channels"] if case["groups"] == "C" else case["groups"])
        return norm_cases.divides(case) and norm_cases.elements(case) <= most and groups <= programs

    return covering.pairwise(norm_cases.PARAMETERS | parameters, valid)


COVERING = covered(FEWER | FEWEST, 2**15, 2**7)
COVERING += [pytest.param(case, marks=pytest.mark.slow) for case in covered(FEWER, 2**17, 2**12)]


@pytest.mark.parametrize("case", COVERING, ids=norm_cases.name_of)
def test_pairwise_covering(launch, launch_backward, device, case):
    dy, args = norm_cases.arguments(case)
    y, stats = launch(*to(args, device))
    (plain, plain_stats), (truth, true_stats) = reference(*args), reference(*wide(args))
    terms = max(1, args[0][:1].numel() // args[3])
    more = 8 * torch.finfo(torch.float32).eps * norm_cases.condition(case, args)  # rounding of x + add, magnified
    check("y", y.cpu(), plain, truth, terms, more)
    check("stats", stats.cpu(), plain_stats, true_stats, terms)
    args[8] = plain_stats
    ours, theirs = launch_backward(dy.to(device), *to(args, device)), reference_backward(dy, *args)
    exact = reference_backward(dy.double(), *wide(args))
    for name, a, p, t in zip(("dx", "dw", "db", "dadd", "dscale", "dshift"), ours, theirs, exact, strict=True):
        check(name, a.cpu(), p, t, terms * max(1, case["batch"]), more * terms**0.5)


@pytest.mark.parametrize("absent", ["add", "scale", "shift"])
@pytest.mark.parametrize("silu", [True, False])
def test_optional_arguments(launch, launch_backward, device, absent, silu):
    args = arguments((2, 8, 4, 4), 2, "contiguous", torch.float32, absent, silu)
    check("y", launch(*to(args, device))[0].cpu(), reference(*args)[0], reference(*wide(args))[0], 64)
    args[8] = reference(*args)[1]
    dy = torch.randn(2, 8, 4, 4)
    ours = launch_backward(dy.to(device), *to(args, device))
    plain, truth = reference_backward(dy, *args), reference_backward(dy.double(), *wide(args))
    for a, p, t in zip(ours, plain, truth, strict=True):
        check(absent, a.cpu(), p, t, 64)


def test_backward_is_deterministic(launch_backward, device):
    args = arguments((2, 48, 24, 24), 4, "channels_last", torch.float32)
    args[8] = reference(*args)[1]
    args, dy = to(args, device), torch.randn(2, 48, 24, 24, device=device)
    for a, b in zip(launch_backward(dy, *args), launch_backward(dy, *args), strict=True):
        assert torch.equal(a, b)


def test_large_inputs_stay_finite(launch, device):
    """silu(-1e4) = -0, silu(1e4) = 1e4: the exponential must not become NaN where it overflows."""
    x = torch.tensor([-1e4, -200.0, -100.0, -20.0, 0.0, 20.0, 200.0, 1e4]).reshape(1, 1, 8)
    stats = torch.tensor([[[0.0, 1.0]]])
    one, zero = torch.ones(1), torch.zeros(1)
    y = launch(*to([x, one, zero, 1, 0.0, None, None, None, stats, True], device))[0].cpu()
    truth = torch.nn.functional.silu(x.double())
    assert (y - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps * 1e4
    assert torch.allclose(y[..., 3:].double(), truth[..., 3:], rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_nan_passes(launch, device):
    args = arguments((1, 4, 4, 4), 2, "contiguous", torch.float32)
    args[0][0, 0, 0, 0] = float("nan")
    y = launch(*to(args, device))[0]
    assert y[0, :2].isnan().all() and not y[0, 2:].isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty(launch, launch_backward, device, shape):
    args = arguments(shape, 2, "contiguous", torch.float32)
    y, stats = launch(*to(args, device))
    assert y.shape == shape and stats.shape == (shape[0], 2, 2)
    args[8] = torch.zeros(shape[0], 2, 2)
    assert launch_backward(torch.zeros(shape, device=device), *to(args, device))[0].shape == shape

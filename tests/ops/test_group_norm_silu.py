"""group_norm_silu: values and all gradients in every layout and type, statistics, derivatives, sizes, errors."""

import sys

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import group_norm_silu

module = sys.modules["fastdiff.ops.group_norm_silu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the U-Nets: 64 x 8^2 and 160 x 7^2 (rows that end inside a vector); an image larger than the two-pass chunk; sides that
# fit nothing; channels that end inside a vector; one image; 1-d and 3-d data.
SHAPES = [
    (3, 64, 32, 8, 8),
    (2, 160, 32, 7, 7),
    (1, 6, 2, 65, 70),
    (2, 6, 3, 5, 7),
    (2, 20, 5, 3, 3),
    (3, 8, 2, 50),
    (1, 4, 2, 3, 4, 5),
]


def inputs(n, c, groups, *space, dtype=torch.float32, channels_last=False, optional=True, mean=3.0):
    generator = torch.Generator().manual_seed(4)

    def make(*shape):
        return torch.randn(shape, generator=generator)

    x = (make(n, c, *space) * 2 + mean).to(dtype)
    if channels_last and len(space) == 2:
        x = x.to(memory_format=torch.channels_last)
    extras = [make(n, c) for _ in range(3)] if optional else [None] * 3
    return [x, make(c), make(c), groups, 1e-5, *extras]


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values(isa, dtype, channels_last, accurate):
    for shape in SHAPES:
        for optional, silu in ((True, True), (False, True), (True, False)):
            args = inputs(*shape, dtype=dtype, channels_last=channels_last, optional=optional)
            y, stats = torch.ops.fastdiff.group_norm_silu(*args, None, silu)
            plain, truth = module.reference(*args, None, silu), module.reference(*double(args), None, silu)
            assert y.stride() == args[0].stride()
            accurate(y, plain[0], truth[0])
            accurate(stats, plain[1], truth[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_against_float64(isa, dtype, channels_last, accurate):
    for shape in SHAPES:
        for optional, silu in ((True, True), (False, True), (True, False)):
            args = inputs(*shape, dtype=dtype, channels_last=channels_last, optional=optional)
            dy = torch.randn_like(args[0])
            stats = module.statistics(args[0], args[5], args[3])
            got = torch.ops.fastdiff.group_norm_silu_backward(dy, *args, stats, silu)
            plain = module.reference_backward(dy, *args, stats, silu)
            truth = module.reference_backward(
                dy.double(), *double(args), module.statistics(*double([args[0], args[5]]), args[3]), silu
            )
            assert got[0].stride() == args[0].stride()
            # A sum of n terms of size s rounds by about sqrt(n) eps s whoever adds them; the mean in float32 alone moves
            # all terms together, which plain PyTorch's own error shows only by luck.
            terms = args[0].numel() / args[0].shape[1]
            floor = 0.0 if dtype == torch.float64 else 4 * terms**0.5 * torch.finfo(torch.float32).eps * 8
            accurate(got[0], plain[0], truth[0], 4e-6 if dtype == torch.float32 else 0.0)
            for g, p, t in zip(got[1:], plain[1:], truth[1:], strict=True):
                accurate(g, p, t, floor)


@pytest.mark.parametrize("mean, std", [(0.0, 1e-4), (1e4, 1.0), (-300.0, 0.01), (1e-3, 1e3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_far_from_zero(isa, mean, std, channels_last):
    # E[x^2] - E[x]^2 would lose these variances altogether.
    x = (torch.randn(2, 32, 24, 24, generator=torch.Generator().manual_seed(0)).double() * std + mean).float()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    one, zero = torch.ones(32), torch.zeros(32)
    y, stats = torch.ops.fastdiff.group_norm_silu(x, one, zero, 8, 0.0, None, None, None, None, True)
    truth, exact = module.reference(*double([x, one, zero]), 8, 0.0, None, None, None, None, True)
    (m, v), (exact_m, exact_v), eps = stats.double().unbind(-1), exact.unbind(-1), torch.finfo(torch.float32).eps
    assert ((m - exact_m).abs() <= eps * exact_m.abs().clamp_min(std)).all()
    # Float32 sums of up to 128 squares a lane, merged in double: sqrt(128) eps / 2, and something for luck.
    assert ((v - exact_v).abs() <= 16 * eps * exact_v).all(), ((v - exact_v) / exact_v).abs().max()
    # The values that reach us are float32: normalising magnifies nothing, for x - mean is exact near the mean.
    torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=2e-6)


def test_extreme_values(isa):
    # Saturated SiLU: no overflow into NaN on either side; a NaN or infinity stays inside its group.
    x = torch.linspace(-1, 1, 2 * 4 * 40).reshape(2, 4, 40)
    y = group_norm_silu(x, torch.full((4,), 1e4), torch.zeros(4), 2)
    assert y.isfinite().all() and (y[x < x.mean()].abs().min() <= 0.5)
    x[0, 1, 3] = float("nan")
    assert group_norm_silu(x, torch.ones(4), torch.zeros(4), 2).isnan().any(-1).tolist() == [
        [True, True, False, False],
        [False] * 4,
    ]


@pytest.mark.parametrize(
    "shape",
    [
        (0, 4, 2, 3, 3),
        (2, 4, 2, 0, 3),
        (2, 4, 2, 3, 0),
        (2, 4, 2),
        (2, 4, 4),
        (1, 1, 1, 1, 1),
        (1, 3, 3, 1, 1),
        (5, 300, 10, 1, 1),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_small_and_empty(isa, shape, channels_last, accurate):
    args = inputs(*shape, channels_last=channels_last)
    y, stats = torch.ops.fastdiff.group_norm_silu(*args, None, True)
    plain, truth = module.reference(*args, None, True), module.reference(*double(args), None, True)
    # Groups of one or two nearly equal elements: 1/sqrt(eps) = 316 magnifies the rounding of x + add.
    accurate(y, plain[0], truth[0], floor=316 * 8 * torch.finfo(torch.float32).eps * 4)
    dy = torch.randn_like(args[0])
    got = torch.ops.fastdiff.group_norm_silu_backward(dy, *args, stats, True)
    expected = module.reference_backward(dy, *args, plain[1], True)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=316 * 4e-6, equal_nan=True)


def test_views(isa, accurate):
    args = inputs(4, 12, 3, 10, 12, optional=False)
    x = args[0]
    for view in (
        x[:, 2:8],
        x[:, :, ::2, 1::3],
        x.transpose(2, 3),
        x[:, ::2],
        x[:1].expand(4, -1, -1, -1),
        x.permute(0, 3, 1, 2),
    ):
        c = view.shape[1]
        args = [view, torch.randn(c), torch.randn(c), 3 if c % 3 == 0 else 2, 1e-5, None, None, None]
        y, _ = torch.ops.fastdiff.group_norm_silu(*args, None, True)
        truth = module.reference(*double(args), None, True)[0]
        assert y.stride() == torch.empty_like(view).stride()
        accurate(y, module.reference(*args, None, True)[0], truth)


@pytest.mark.parametrize("of_dy", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
def test_gradient_in_another_layout(isa, of_x, of_dy):
    args = inputs(2, 8, 4, 6, 5)
    args[0] = args[0].to(memory_format=of_x)
    dy, stats = torch.randn(2, 8, 6, 5).to(memory_format=of_dy), module.statistics(args[0], args[5], 4)
    got = torch.ops.fastdiff.group_norm_silu_backward(dy, *args, stats, True)
    for g, e in zip(got, module.reference_backward(dy, *args, stats, True), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=2e-5)


def test_is_group_norm(isa):
    x, w, b, groups, eps, *_ = inputs(2, 8, 4, 6, 5)
    y = group_norm_silu(x, w, b, groups, eps)
    torch.testing.assert_close(y, functional.silu(functional.group_norm(x, groups, w, b, eps)), rtol=1e-5, atol=2e-6)


def test_given_statistics(isa):
    args = inputs(2, 8, 4, 6, 5)
    stats = module.statistics(args[0], args[5], 4)
    torch.testing.assert_close(group_norm_silu(*args, stats=stats), group_norm_silu(*args), rtol=1e-5, atol=1e-5)
    other = stats + 0.5
    got, kept = torch.ops.fastdiff.group_norm_silu(*args, other, True)
    torch.testing.assert_close(got, module.reference(*args, other, True)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, other) and kept.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_and_batch_do_not_change_bits(isa, channels_last):
    args = inputs(3, 32, 8, 20, 20, channels_last=channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.ops.fastdiff.group_norm_silu(*args, None, True)[0])
    finally:
        torch.set_num_threads(before)
    alone = [a[1:2] if isinstance(a, torch.Tensor) and a.shape[0] == 3 else a for a in args]
    results.append(torch.ops.fastdiff.group_norm_silu(*alone, None, True)[0])
    assert all(torch.equal(results[0], r) for r in results[1:3]) and torch.equal(results[3][0], results[0][1])


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu):
    x, w, b, groups, eps, *optional = double(inputs(2, 4, 2, 2, 3, mean=0.5))
    tensors = [t.requires_grad_() for t in (x, w, b, *optional)]

    def run(x, w, b, add, scale, shift):
        return group_norm_silu(x, w, b, groups, eps, add, scale, shift, silu=silu)

    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True)


def test_functorch_agrees_with_forward_ad():
    x, w, b, groups, eps, *_ = inputs(2, 4, 2, 3, 3)
    tangent = torch.randn_like(x)

    def run(x):
        return group_norm_silu(x, w, b, groups, eps)

    def plain(x):
        return functional.silu(functional.group_norm(x, groups, w, b, eps))

    _, got = torch.func.jvp(run, (x,), (tangent,))
    torch.testing.assert_close(got, torch.func.jvp(plain, (x,), (tangent,))[1], rtol=1e-4, atol=1e-5)
    total = torch.func.grad(lambda x: run(x).square().sum())(x)
    torch.testing.assert_close(total, torch.func.grad(lambda x: plain(x).square().sum())(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    args = inputs(2, 4, 2, 3, 5, dtype=dtype, channels_last=channels_last)
    dy, stats = torch.randn_like(args[0]), module.statistics(args[0], args[5], 2)
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu_backward.default, (dy, *args, stats, True))
    args[0].requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if dtype in (torch.bfloat16, torch.float16):  # the aot test compares gradients more tightly than these types allow
        tests = tests[:3]
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, (*args, None, True), test_utils=tests)


def test_compiles_as_one_graph():
    args = inputs(2, 8, 4, 6, 5)
    for t in args:
        if isinstance(t, torch.Tensor):
            t.requires_grad_()
    tensors = [t for t in args if isinstance(t, torch.Tensor)]

    def loss(*args):
        return group_norm_silu(*args).square().sum()

    eager, compiled = loss(*args), torch.compile(loss, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(3)}, "x: expected a floating-point tensor"),
        ({0: torch.zeros(2, 8, dtype=torch.int64)}, "x: expected a floating-point tensor"),
        ({3: 3}, "groups: 3 does not divide the 8 channels"),
        ({3: 0}, "groups: 0 does not divide"),
        ({4: -1.0}, "eps: -1.0 is negative"),
        ({1: torch.zeros(7)}, "weight: .*does not fit x"),
        ({2: torch.zeros(8, dtype=torch.int64)}, "bias: expected a floating-point"),
        ({5: torch.zeros(8)}, "add: .*does not fit x"),
        ({6: torch.zeros(2, 8, 1)}, "scale: .*does not fit x"),
        ({7: torch.zeros(3, 8)}, "shift: .*does not fit x"),
        ({1: torch.zeros(8, device="meta")}, "weight: is on meta"),
    ],
)
def test_errors_name_the_argument(change, message):
    args = inputs(2, 8, 4, 6, 5)
    for i, value in change.items():
        args[i] = value
    with pytest.raises((TypeError, ValueError), match=message):
        group_norm_silu(*args)

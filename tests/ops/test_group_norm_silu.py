"""group_norm_silu: values and all gradients in every layout and type, statistics, derivatives, sizes, errors."""

import itertools
import sys

import covering
import norm_cases
import pytest
import torch
from torch.autograd import forward_ad
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


def check_case(case, accurate):
    dy, args = norm_cases.arguments(case)
    y, stats = torch.ops.fastdiff.group_norm_silu(*args)
    (plain, plain_stats), (truth, true_stats) = module.reference(*args), module.reference(*double(args))
    assert y.stride() == args[0].stride() if case["layout"] != "view" else y.is_contiguous()
    # Rounding of x and x + add, about 8, by so much; groups of one or a few elements may be nearly constant.
    eps, magnified = torch.finfo(torch.float32).eps, norm_cases.condition(case, args)
    accurate(y, plain, truth, floor=8 * eps * magnified)
    # A lane adds 64 squares in float32, each addition within eps / 2 of the sum so far: 16 eps of the whole at worst.
    accurate(stats, plain_stats, true_stats, floor=16 * eps * float(true_stats[..., 1].max()) if true_stats.numel() else 0.0)
    args[8] = plain_stats
    got, theirs = (f(dy, *args) for f in (torch.ops.fastdiff.group_norm_silu_backward, module.reference_backward))
    exact = module.reference_backward(dy.double(), *double(args))
    terms = dy.numel() / case["channels"]
    for i, (g, p, t) in enumerate(zip(got, theirs, exact, strict=True)):
        # sums of `terms` numbers; dx and dadd are differences of numbers as large as 1/std
        accurate(g, p, t, floor=8 * eps * (1 + terms**0.5) * (magnified if i in (0, 3) else 4 * magnified**0.5))


@pytest.mark.parametrize("case", covering.pairwise(norm_cases.PARAMETERS, norm_cases.divides), ids=norm_cases.name_of)
def test_pairwise_covering(case, accurate):
    """On the best instruction set; a third of a second where the tensor is large."""
    check_case(case, accurate)


# Found by the full product: gradients that cancel to the last bit in groups of one element, and a first guess of the mean
# from one channel where each has a pixel.
TINY = [
    (32, "C", (1, 1), 3, "contiguous", "bfloat16", "scale shift", True),
    (32, "C", (1, 1), 3, "channels_last", "float16", "scale shift", True),
    (3, 1, (1, 1), 1, "view", "bfloat16", "add", True),
    (3, 1, (1, 1), 3, "view", "float32", "add", False),
    (192, 4, (1, 1), 3, "view", "float32", "add", True),
]


@pytest.mark.parametrize("values", TINY, ids=lambda values: "-".join(map(str, values)).replace(" ", "+"))
def test_tiny_groups(isa, values, accurate):
    check_case(dict(zip(norm_cases.PARAMETERS, values, strict=True)), accurate)


@pytest.mark.slow
@pytest.mark.parametrize("channels", norm_cases.PARAMETERS["channels"])
def test_full_product(channels, accurate):
    rest = [values for name, values in norm_cases.PARAMETERS.items() if name != "channels"]
    for values in itertools.product([channels], *rest):
        case = dict(zip(norm_cases.PARAMETERS, values, strict=True))
        if norm_cases.divides(case) and norm_cases.elements(case) <= 2**20:
            check_case(case, accurate)


@pytest.mark.parametrize("mean, std", [(0.0, 1e-4), (1e4, 1.0), (-300.0, 0.01), (1e-3, 1e3)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_add", [False, True])
def test_images_far_from_zero(isa, mean, std, channels_last, with_add):
    # E[x^2] - E[x]^2 would lose these variances altogether.
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 32, 24, 24, generator=generator).double() * std + mean).float()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    one, zero = torch.ones(32), torch.zeros(32)
    add = torch.randn(2, 32, generator=generator) * std if with_add else None
    y, stats = torch.ops.fastdiff.group_norm_silu(x, one, zero, 8, 0.0, add, None, None, None, True)
    truth, exact = module.reference(
        *double([x, one, zero]), 8, 0.0, None if add is None else add.double(), None, None, None, True
    )
    (m, v), (exact_m, exact_v), eps = stats.double().unbind(-1), exact.unbind(-1), torch.finfo(torch.float32).eps
    # With add, channels lie apart, and float32 sums around the first guess of a mean drift further.
    assert ((m - exact_m).abs() <= (1 + with_add) * eps * torch.maximum(exact_m.abs(), exact_v.sqrt())).all()
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
        x[:, :, :1, :1].contiguous().expand(4, 12, 10, 12),  # pixels that are all one: channels-last by its strides alone
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
@pytest.mark.parametrize("shape", [(3, 32, 8, 20, 20), (3, 40, 5, 64, 65)])  # whole, and in several pieces
def test_threads_and_batch_do_not_change_bits(isa, channels_last, shape):
    args = inputs(*shape, channels_last=channels_last)
    dy = torch.randn_like(args[0])

    def run(args, dy):
        y, stats = torch.ops.fastdiff.group_norm_silu(*args, None, True)
        grads = torch.ops.fastdiff.group_norm_silu_backward(dy, *args, stats, True)
        return (y, stats, grads[0], *grads[3:]), grads[1:3]

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(args, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(results[0][i], other[i], strict=True))
    alone = [a[1:2] if isinstance(a, torch.Tensor) and a.shape[0] == 3 else a for a in args]
    one, _ = run(alone, dy[1:2])  # the parameters' gradients are sums over the batch
    assert all(torch.equal(a[0], b[1]) for a, b in zip(one, results[0][0], strict=True))


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


def plain(x, w, b, add, scale, shift, groups, eps):
    """The formula of plain PyTorch, whose forward-mode derivatives are its own."""
    broadcast = (*add.shape, 1, 1)
    h = functional.group_norm(x + add.reshape(broadcast), groups, w, b, eps)
    return functional.silu(h * (1 + scale.reshape(broadcast)) + shift.reshape(broadcast))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [*range(6), "all"])
def test_tangents_against_float64(dtype, which, accurate):
    """Of one argument at a time and of all together, by func.jvp, by forward_ad and by forward_ad compiled."""
    args = inputs(2, 8, 4, 6, 5, dtype=dtype, mean=0.5)
    groups, eps = args[3:5]
    primals = [t.to(dtype) for t in args if isinstance(t, torch.Tensor)]
    tangents = [torch.randn_like(t) if which in (i, "all") else torch.zeros_like(t) for i, t in enumerate(primals)]

    def ours(x, w, b, add, scale, shift):
        return group_norm_silu(x, w, b, groups, eps, add, scale, shift)

    def theirs(*tensors):
        return torch.func.jvp(lambda *t: plain(*t, groups, eps), tuple(tensors[:6]), tuple(tensors[6:]))[1]

    def by_dual(*tensors):
        with forward_ad.dual_level():
            given = [p if which not in (i, "all") else forward_ad.make_dual(p, t)
                     for i, (p, t) in enumerate(zip(tensors[:6], tensors[6:], strict=True))]  # fmt: skip
            return forward_ad.unpack_dual(ours(*given)).tangent

    truth = theirs(*(t.double() for t in (*primals, *tangents)))
    nearly = theirs(*primals, *tangents)
    ways = {
        "func.jvp": lambda *t: torch.func.jvp(ours, tuple(t[:6]), tuple(t[6:]))[1],
        "forward_ad": by_dual,
        "compiled": torch.compile(by_dual, fullgraph=True),
    }
    for name, way in ways.items():
        if name == "compiled" and which not in (0, "all"):
            continue  # a graph takes a second, and the two differ only in which tangents are absent
        accurate(way(*primals, *tangents).to(dtype), nearly.to(dtype), truth)


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

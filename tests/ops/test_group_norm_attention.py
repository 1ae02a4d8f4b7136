"""group_norm_attention: values, gradients and tangents in every layout and type, the batch's independence, sizes, errors."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fastdiff.ops import group_norm_attention

module = sys.modules["fastdiff.ops.group_norm_attention"]
op = torch.ops.fastdiff.group_norm_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# N, C, E, heads, groups, space. Of the U-Nets; pixels that end inside a vector, a tile and a pair; one pixel; odd channels
# and head widths, and an inner width that is not C; several panels of queries and keys.
SHAPES = [
    (2, 64, 64, 4, 32, (8, 8)),
    (2, 64, 64, 1, 32, (7, 7)),
    (3, 32, 64, 2, 4, (1, 1)),
    (2, 20, 30, 2, 5, (3, 21)),
    (1, 7, 9, 3, 7, (5, 7)),
    (1, 96, 96, 6, 3, (33,)),
    (1, 40, 24, 1, 8, (17, 15)),
    (1, 8, 16, 1, 4, (31, 33)),  # 1023 terms a sum: added one after the other they would lose more than PyTorch's do
]


def inputs(n, c, e, heads, groups, space, dtype=torch.float32, channels_last=False, biases=True, out_scale=0.7):
    generator = torch.Generator().manual_seed(4)

    def make(*shape):
        return torch.randn(shape, generator=generator)

    x = (make(n, c, *space) * 2 + 3).to(dtype)
    if channels_last and len(space) == 2:
        x = x.to(memory_format=torch.channels_last)
    # Scores of a standard deviation of about 3: a softmax that is neither flat nor a maximum.
    qkv, out = (make(3 * e, c) * (3 / c) ** 0.5).to(dtype), (make(c, e) * e**-0.5).to(dtype)
    qkv_bias, out_bias = (make(3 * e), make(c)) if biases else (None, None)
    return [
        x,
        1 + make(c) / 4,
        make(c),
        groups,
        1e-5,
        qkv,
        qkv_bias,
        out,
        out_bias,
        heads,
        (e / heads) ** -0.5,
        out_scale,
        None,
    ]


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def rounded(args):
    """Plain PyTorch as the modules would compute it, every intermediate in the type of x."""
    x, weight, bias, groups, eps, qkv, qkv_bias, out, out_bias, heads, scale, out_scale, _ = args
    n = len(x)
    pixels, d = x.shape[2:].numel(), out.shape[1] // heads
    kernels = [1] * (x.dim() - 2)
    convolution = {1: functional.conv1d, 2: functional.conv2d}[len(kernels)]

    def project(t, w, b):
        return convolution(t, w.reshape(*w.shape, *kernels).to(x.dtype), None if b is None else b.to(x.dtype))

    h = functional.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    q, k, v = project(h, qkv, qkv_bias).reshape(n, 3, heads, d, pixels).transpose(-1, -2).unbind(1)
    a = functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(-1, -2).reshape(n, heads * d, *x.shape[2:])
    return (x + project(a, out, out_bias)) * out_scale


def wanting(args):
    tensors = [a for a in args[:-1] if isinstance(a, torch.Tensor)]
    return [t.requires_grad_() for t in tensors]


def caller(args):
    """f(tensors) = y with the tensors in the order of `wanting`."""

    def run(*tensors, call=None):
        given = iter(tensors)
        filled = [next(given) if isinstance(a, torch.Tensor) else a for a in args[:-1]]
        x, weight, bias, groups, eps, qkv, qkv_bias, out, out_bias, heads, scale, out_scale = filled
        if call is not None:
            return call([*filled, None])
        return group_norm_attention(
            x, weight, bias, groups, qkv, qkv_bias, out, out_bias, heads, eps, out_scale=out_scale, scale=scale
        )

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values(isa, dtype, channels_last, accurate):
    for shape in SHAPES:
        for biases in (True, False):
            args = inputs(*shape, dtype=dtype, channels_last=channels_last, biases=biases)
            y, stats = op(*args)
            truth = module.reference(*double(args))
            assert y.stride() == args[0].stride()
            accurate(y, rounded(args), truth[0])
            # Against float64 itself the truth is no better than we are: both are sums of many terms.
            accurate(stats, module.reference(*args)[1], truth[1], 1e-14 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_against_float64(dtype, accurate):
    for shape in SHAPES:
        for channels_last in (False, True):
            args = inputs(*shape, dtype=dtype, channels_last=channels_last)
            dy = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            run, tensors = caller(args), wanting(args)
            got = torch.autograd.grad(run(*tensors), tensors, dy)
            plain = torch.autograd.grad(run(*tensors, call=rounded), tensors, dy)
            exact = wanting(double([a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
            truth = torch.autograd.grad(run(*exact, call=lambda a: module.reference(*a)[0]), exact, dy.double())
            assert got[0].stride() == args[0].stride()
            for g, p, t in zip(got, plain, truth, strict=True):
                # Sums over pixels and samples round by about sqrt(terms) eps of their largest term, whoever adds them.
                terms = args[0].numel() / args[0].shape[1]
                accurate(g, p, t, 8 * terms**0.5 * torch.finfo(dtype).eps)


def test_against_the_modules(isa):
    args = inputs(2, 32, 32, 2, 8, (6, 5))
    torch.testing.assert_close(op(*args)[0], rounded(args), rtol=1e-5, atol=1e-5)
    args[10], args[11] = 1 / 4, 1.0
    x, weight, bias, groups, eps, qkv, qkv_bias, out, out_bias, heads, *_ = args
    y = group_norm_attention(x, weight, bias, groups, qkv, qkv_bias, out, out_bias, heads, eps)  # the defaults
    torch.testing.assert_close(y, rounded(args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 40.0])
def test_any_scale(isa, scale):
    """A negative factor turns the order of the scores around; a large one makes a softmax of zeros and ones."""
    args = inputs(1, 16, 16, 2, 4, (5, 9))
    args[10] = scale
    torch.testing.assert_close(op(*args)[0].double(), module.reference(*double(args))[0], rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_stay_in_their_sample(isa):
    args = inputs(3, 16, 16, 2, 4, (5, 5))
    before = op(*args)[0]
    args[0][0, 3, 2, 1], args[0][1, 1, 0, 0] = float("nan"), float("inf")
    after = op(*args)[0]
    assert after[0].isnan().all() and after[1].isnan().all() and torch.equal(after[2], before[2])


@pytest.mark.parametrize(
    "shape", [(0, 8, 8, 2, 4, (3, 3)), (2, 8, 8, 2, 4, (0, 3)), (2, 8, 8, 2, 4, ()), (5, 8, 2, 2, 1, (1, 1))]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_small_and_empty(isa, shape, channels_last):
    args = inputs(*shape, channels_last=channels_last)
    expected = module.reference(*args)[0]
    # One pixel or none in a group of two channels: 1/sqrt(eps) = 316 magnifies rounding.
    torch.testing.assert_close(op(*args)[0], expected, rtol=1e-4, atol=316 * 4e-6)
    tensors, run = wanting(args), caller(args)
    got = torch.autograd.grad(run(*tensors).sum(), tensors)
    plain = torch.autograd.grad(run(*tensors, call=lambda a: module.reference(*a)[0]).sum(), tensors)
    for g, p in zip(got, plain, strict=True):
        torch.testing.assert_close(g, p, rtol=1e-3, atol=316 * 1e-4, equal_nan=True)


def test_views(isa, accurate):
    base = torch.randn(4, 12, 10, 12, generator=torch.Generator().manual_seed(0))
    for x in (
        base[:, 2:8],
        base[:, :, ::2, 1::3],
        base.transpose(2, 3),
        base[:, ::2],
        base[:1].expand(4, -1, -1, -1),
        base[:, :, :1, :1].contiguous().expand(4, 12, 10, 12),  # pixels that are all one
        base.permute(0, 3, 1, 2),
    ):
        args = inputs(4, x.shape[1], 8, 2, 2, x.shape[2:])
        args[0] = x
        args[5], args[7] = args[5].mT.contiguous().mT, args[7].mT.contiguous().mT
        y = op(*args)[0]
        assert y.stride() == torch.empty_like(x).stride()
        accurate(y, rounded(args), module.reference(*double(args))[0])


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_type(isa, dtype, parameters, accurate):
    args = inputs(2, 16, 16, 2, 4, (4, 4), dtype=dtype)
    args[1:] = [a.to(parameters) if isinstance(a, torch.Tensor) else a for a in args[1:]]
    accurate(op(*args)[0], rounded(args), module.reference(*double(args))[0])
    tensors = wanting(args)
    grads = torch.autograd.grad(caller(args)(*tensors).float().sum(), tensors)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]


def test_given_statistics(isa):
    args = inputs(2, 8, 8, 2, 4, (6, 5))
    stats = op(*args)[1]
    args[-1] = stats
    torch.testing.assert_close(op(*args)[0], op(*args[:-1], None)[0], rtol=1e-6, atol=1e-6)
    args[-1] = stats + 0.5
    got, kept = op(*args)
    torch.testing.assert_close(got, module.reference(*args)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, args[-1]) and kept.data_ptr() != args[-1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_and_batch_do_not_change_bits(isa, dtype, channels_last):
    args = inputs(3, 48, 32, 2, 8, (9, 9), dtype=dtype, channels_last=channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):  # 5 > 3 samples: the threads share each sample's work
            torch.set_num_threads(threads)
            results.append(op(*args)[0])
    finally:
        torch.set_num_threads(before)
    alone = op(args[0][1:2], *args[1:])[0]
    assert all(torch.equal(results[0], r) for r in results[1:]) and torch.equal(alone[0], results[0][1])


def test_derivatives_in_chunks(monkeypatch):
    """A score budget below one sample's still takes one sample at a time, with the same gradients."""
    args = inputs(3, 8, 8, 2, 4, (4, 4))
    tensors, run = wanting(args), caller(args)
    whole = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    for budget in (1, 2 * 2 * 16**2):
        monkeypatch.setattr(module, "SCORES", budget)
        for a, b in zip(torch.autograd.grad(run(*tensors).square().sum(), tensors), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biases", [True, False])
def test_gradcheck(biases):
    args = double(inputs(2, 4, 6, 2, 2, (2, 3), biases=biases))
    assert torch.autograd.gradcheck(caller(args), wanting(args), check_forward_ad=True)


@pytest.mark.parametrize("present", [(0,), (5,), (1, 6), (7, 8)])
def test_tangents_of_some(present):
    """Tangents that are absent are zero."""
    args = inputs(2, 6, 4, 2, 3, (3, 3))
    tangents = {i: torch.randn(args[i].shape, generator=torch.Generator().manual_seed(i)) for i in present}

    def run(call, convert):
        def of(*moved):
            filled = [convert(a) if isinstance(a, torch.Tensor) else a for a in args]
            for i, t in zip(present, moved, strict=True):
                filled[i] = t
            return call(filled)

        primals = tuple(convert(args[i]) for i in present)
        return torch.func.jvp(of, primals, tuple(convert(tangents[i]) for i in present))[1]

    def ours(a):
        x, weight, bias, groups, eps, qkv, qkv_bias, out, out_bias, heads, scale, out_scale, _ = a
        return group_norm_attention(
            x, weight, bias, groups, qkv, qkv_bias, out, out_bias, heads, eps, out_scale=out_scale, scale=scale
        )

    truth = run(lambda a: module.reference(*a)[0], torch.Tensor.double)
    torch.testing.assert_close(run(ours, lambda t: t).double(), truth, rtol=1e-4, atol=1e-5)


def test_tangents_three_ways(accurate):
    """torch.func.jvp, forward_ad eager and compiled, against float64; Inductor would only add minutes of C++ compilation."""
    forward = torch.autograd.forward_ad
    args = inputs(2, 16, 16, 2, 4, (5, 5))
    tensors, run = [t.detach() for t in wanting(args)], caller(args)
    generator = torch.Generator().manual_seed(9)
    tangents = [torch.randn(t.shape, generator=generator) for t in tensors]
    wide = tuple(t.double() for t in tensors), tuple(t.double() for t in tangents)

    def plain(call):
        return lambda *t: run(*t, call=call)

    truth = torch.func.jvp(plain(lambda a: module.reference(*a)[0]), *wide)[1]
    theirs = torch.func.jvp(plain(lambda a: module.reference(*a)[0]), tuple(tensors), tuple(tangents))[1]

    def with_forward_ad(fn):
        with forward.dual_level():
            y = fn(*(forward.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)))
            return forward.unpack_dual(y).tangent

    def tangent(*both):
        half = len(both) // 2
        with forward.dual_level():
            y = run(*(forward.make_dual(t, d) for t, d in zip(both[:half], both[half:], strict=True)))
            return forward.unpack_dual(y).tangent

    accurate(torch.func.jvp(run, tuple(tensors), tuple(tangents))[1], theirs, truth)
    accurate(with_forward_ad(run), theirs, truth)
    accurate(torch.compile(tangent, fullgraph=True, backend="aot_eager")(*tensors, *tangents), theirs, truth)


def test_functorch_gradients():
    args = inputs(2, 8, 8, 2, 4, (3, 3))
    tensors, run = [t.detach() for t in wanting(args)], caller(args)
    got = torch.func.grad(lambda x: run(x, *tensors[1:]).square().sum())(tensors[0])
    plain = torch.func.grad(lambda x: run(x, *tensors[1:], call=rounded).square().sum())(tensors[0])
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    args = inputs(2, 8, 12, 2, 4, (3, 5), dtype=dtype, channels_last=channels_last)
    stats = op(*args)[1]
    torch.library.opcheck(
        torch.ops.fastdiff.group_norm_attention_backward.default, (torch.randn_like(args[0]), *args[:-1], stats)
    )
    args[0].requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if dtype in (torch.bfloat16, torch.float16):  # the aot test compares gradients more tightly than these types allow
        tests = tests[:3]
    torch.library.opcheck(op.default, tuple(args), test_utils=tests)


def test_compiles_as_one_graph():
    args = inputs(2, 8, 8, 2, 4, (6, 5))
    tensors, run = wanting(args), caller(args)

    def loss(*tensors):
        return run(*tensors).square().sum()

    eager, compiled = loss(*tensors), torch.compile(loss, fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, eager)
    for c, e in zip(torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors), strict=True):
        torch.testing.assert_close(c, e, rtol=1e-5, atol=1e-4)


ARGUMENTS = [
    "x",
    "norm_weight",
    "norm_bias",
    "groups",
    "qkv_weight",
    "qkv_bias",
    "out_weight",
    "out_bias",
    "heads",
    "eps",
    "stats",
]


def good():
    x, weight, bias, groups, eps, qkv, qkv_bias, out, out_bias, heads, *_ = inputs(2, 8, 4, 2, 4, (3, 3))
    values = (x, weight, bias, groups, qkv, qkv_bias, out, out_bias, heads, eps, None)
    return dict(zip(ARGUMENTS, values, strict=True))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(3), "x: expected a floating-point tensor"),
        ("x", torch.zeros(2, 8, dtype=torch.int64), "x: expected a floating-point tensor"),
        ("groups", 3, "groups: 3 does not divide the 8 channels"),
        ("heads", 3, "heads: 3 does not divide the 4 inner channels"),
        ("heads", 0, "heads: 0 does not divide"),
        ("eps", -1.0, "eps: -1.0 is negative"),
        ("norm_weight", torch.zeros(7), "norm_weight: .*does not fit x"),
        ("qkv_weight", torch.zeros(11, 8), "qkv_weight: .*expected \\(12, 8\\)"),
        ("qkv_weight", torch.zeros(12, 8, 1, 1), "qkv_weight: .*expected \\(12, 8\\)"),
        ("qkv_bias", torch.zeros(4), "qkv_bias: .*expected \\(12,\\)"),
        ("qkv_bias", torch.zeros(12, dtype=torch.int32), "qkv_bias: expected a floating-point"),
        ("x", torch.zeros(2, 0, 3), "x: \\(2, 0, 3\\) has no channels"),
        ("out_weight", torch.zeros(4, 8), "out_weight: .*expected \\[8, E\\]"),
        ("out_weight", torch.zeros(8, 0), "out_weight: .*expected \\[8, E\\]"),
        ("out_bias", torch.zeros(9), "out_bias: .*expected \\(8,\\)"),
        ("out_bias", torch.zeros(8, device="meta"), "out_bias: is on meta"),
        ("stats", torch.zeros(2, 3, 2), "stats: .*does not fit x"),
    ],
)
def test_errors_name_the_argument(name, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        group_norm_attention(**(good() | {name: value}))


@pytest.mark.parametrize(
    "index, value",
    [
        (0, torch.zeros(3)),
        (0, torch.zeros(2, 0, 3)),
        (3, 3),
        (5, torch.zeros(3, 8)),
        (7, torch.zeros(8)),
        (9, 3),
        (12, torch.zeros(2, 9, 2)),
    ],
)
def test_the_kernel_checks_too(isa, index, value):
    args = inputs(2, 8, 4, 2, 4, (3, 3))
    args[index] = value
    with pytest.raises(RuntimeError):
        op(*args)


sizes = st.integers(0, 5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_anything_is_computed_or_refused(data):
    """Any shapes, strides and types: the reference's values, or an exception that names an argument; never a crash."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))  # what fails once fails again
    args = good() | {"eps": 0.1}  # of groups of almost equal elements, 1e-5 would magnify roundings 316 times
    dtypes = st.sampled_from([*DTYPES, torch.int32, torch.bool])
    c = draw(st.integers(1, 9))
    x = torch.randn([draw(sizes), c, *draw(st.lists(sizes, max_size=3))])
    if draw(st.booleans()) and x.dim() > 2:
        x = x.transpose(1, -1) if draw(st.booleans()) else x[..., ::2]
    c, e, heads = x.shape[1], draw(st.integers(0, 8)), draw(st.integers(-1, 4))
    args |= {"x": x, "norm_weight": torch.randn(c), "norm_bias": torch.randn(c), "groups": draw(st.integers(0, 3))}
    args |= {"qkv_weight": torch.randn(3 * e, c), "qkv_bias": None, "out_weight": torch.randn(c, e), "heads": heads}
    args |= {"out_bias": draw(st.sampled_from([None, torch.randn(c), torch.randn(c + 1)]))}
    which = draw(st.sampled_from(["x", "norm_weight", "qkv_weight", "out_weight"]))
    args[which] = args[which].to(draw(dtypes))
    if draw(st.integers(0, 9)) == 0:
        args[which] = args[which][None]
    try:
        y = group_norm_attention(**args)
    except (TypeError, ValueError) as error:
        assert any(str(error).startswith(name) for name in ARGUMENTS), error
        return
    full = (
        args["norm_weight"],
        args["norm_bias"],
        args["groups"],
        args["eps"],
        args["qkv_weight"],
        None,
        args["out_weight"],
    )
    truth = module.reference(*double([args["x"], *full, args["out_bias"], heads, (e / heads) ** -0.5, 1.0, None]))[0]
    close = {torch.bfloat16: 0.2, torch.float16: 0.03}.get(args["x"].dtype, 1e-3)
    torch.testing.assert_close(y.double(), truth, rtol=close, atol=close, equal_nan=True)

"""conv3x3: values, gradients and tangents against float64, every option alone and all together, what serves it, errors."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional

from fastdiff.info import report
from fastdiff.ops import Norm, conv3x3, conv3x3_pack, group_norm_silu, implementations

module = sys.modules["fastdiff.ops.conv3x3"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# n, inputs, outputs, height, width: a level of the networks; odd sides and channels; one pixel; the first layer.
SHAPES = [(2, 16, 24, 8, 8), (3, 6, 4, 5, 7), (2, 8, 8, 1, 1), (1, 3, 8, 6, 4)]


def make(shape, dtype=torch.float32, channels_last=False, only=None):
    """Arguments of conv3x3; `only`: a set of the optional ones, else all."""
    n, i, o, h, w = shape
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return torch.randn(size, generator=generator)

    def image(c, mean):
        t = (draw(n, c, h, w) + mean).to(dtype)
        return t.to(memory_format=torch.channels_last) if channels_last else t

    groups = 2 if i % 2 == 0 else 1
    norm = Norm(draw(i), draw(i), groups, 1e-5, draw(n, i), draw(n, i), draw(n, i))
    x, weight = image(i, 2.0), draw(o, i, 3, 3) / (9 * i) ** 0.5
    options = {"bias": draw(n, o), "norm": norm, "residual": image(o, -1.0), "out_scale": 0.5**0.5, "stats_groups": 4}
    return x, weight, {k: v for k, v in options.items() if only is None or k in only}


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, Norm):
        return Norm(*map(double, value))
    return {k: double(v) for k, v in value.items()} if isinstance(value, dict) else value


def textbook(x, weight, bias=None, norm=None, residual=None, out_scale=1.0, stats_groups=0):
    """As in the papers' code: PyTorch's group_norm, silu, conv2d, and moments; all in x's dtype."""
    h = x
    if norm is not None:
        v = x if norm.add is None else x + norm.add[..., None, None].to(x.dtype)
        h = functional.group_norm(v, norm.groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        h = h if norm.scale is None else h * (1 + norm.scale[..., None, None].to(x.dtype))
        h = h if norm.shift is None else h + norm.shift[..., None, None].to(x.dtype)
        h = functional.silu(h) if norm.silu else h
    y = functional.conv2d(h, weight.to(x.dtype), padding=1)
    y = y if bias is None else y + bias[..., None, None].to(x.dtype)
    y = (y if residual is None else y + residual) * out_scale
    if not stats_groups:
        return y, None
    g = y.reshape(y.shape[0], stats_groups, -1)
    wide = g.float() if x.dtype != torch.float64 else g
    return y, torch.stack((wide.mean(-1), wide.var(-1, correction=0)), -1)


OPTIONS = ["bias", "norm", "residual", "out_scale", "stats_groups"]
SUBSETS = [{*s} for k in (0, 1, 5) for s in itertools.combinations(OPTIONS, k)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(isa, dtype, channels_last, accurate):
    for shape, only in itertools.product(SHAPES, SUBSETS):
        x, weight, options = make(shape, dtype, channels_last, only)
        y, stats = conv3x3(x, weight, **options)
        plain, truth = textbook(x, weight, **options), textbook(x.double(), weight.double(), **double(options))
        assert y.stride() == x.new_empty(y.shape).to(memory_format=form_of(channels_last)).stride() or min(y.shape) == 1
        # Sums of 9 I products in another order than PyTorch's; in float64 plain and truth are one computation.
        accurate(y, plain[0], truth[0], truth[0].abs().max().item() * (9 * shape[1]) ** 0.5 * torch.finfo(torch.float64).eps)
        if "stats_groups" in only:
            # of y as it is: what the next norm sees
            exact = module.statistics(y.double(), None, 4)
            accurate(stats, module.statistics(y, None, 4), exact)
        else:
            assert stats is None


def form_of(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def test_padding_follows_the_norm():
    # A norm that turns zeros into ones: padding before it would put ones around the image.
    x, weight = torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
    y, _ = conv3x3(x, weight, norm=Norm(torch.ones(2), torch.ones(2), 1, silu=False))
    assert y[0, 0].tolist() == [[8, 12, 8], [12, 18, 12], [8, 12, 8]]


def test_statistics_serve_the_next_norm():
    x, weight, options = make(SHAPES[0])
    y, stats = conv3x3(x, weight, **options)
    w, b = torch.randn(24), torch.randn(24)
    torch.testing.assert_close(group_norm_silu(y, w, b, 4, stats=stats), group_norm_silu(y, w, b, 4), rtol=1e-5, atol=1e-5)
    # An additive embedding goes into the bias, and the statistics hold for the sum.
    embedding = torch.randn(2, 24)
    inside, stats = conv3x3(x, weight, **(options | {"bias": options["bias"] + embedding, "out_scale": 1.0}))
    outside, _ = conv3x3(x, weight, **(options | {"out_scale": 1.0}))
    expected = group_norm_silu(outside, w, b, 4, add=embedding)
    torch.testing.assert_close(group_norm_silu(inside, w, b, 4, stats=stats), expected, rtol=1e-4, atol=1e-5)


def test_given_statistics_of_x():
    x, weight, options = make(SHAPES[0])
    norm = options["norm"]
    given = module.statistics(x, norm.add, norm.groups)
    again = conv3x3(x, weight, **(options | {"norm": norm._replace(stats=given)}))
    torch.testing.assert_close(again, conv3x3(x, weight, **options), rtol=1e-5, atol=1e-5)
    other = conv3x3(x, weight, norm=norm._replace(stats=given + 1))[0]
    h = group_norm_silu(x, *norm[:7], stats=given + 1)
    torch.testing.assert_close(other, functional.conv2d(h, weight, padding=1))


def test_packed_weights_are_those_multiplied():
    x, weight, options = make(SHAPES[0])
    packed = conv3x3_pack(weight)
    stand_in = weight.new_full((1,), float("nan")).expand(weight.shape)
    torch.testing.assert_close(conv3x3(x, stand_in, packed=packed, **options), conv3x3(x, weight, **options))
    assert packed.data_ptr() != weight.data_ptr()
    torch.library.opcheck(torch.ops.fastdiff.conv3x3_pack.default, (weight, "direct", True))


NAMES = ("x", "weight", "bias", "residual", "w", "b", "add", "scale", "shift")


def flat(options):
    """Arguments with every tensor of the options first, and the way back."""
    norm = options["norm"]
    tensors = [options["bias"], options["residual"], norm.weight, norm.bias, norm.add, norm.scale, norm.shift]

    def rebuild(bias, residual, w, b, add, scale, shift):
        given = Norm(w, b, norm.groups, norm.eps, add, scale, shift, None, norm.silu)
        return {"bias": bias, "residual": residual, "norm": given, "out_scale": options["out_scale"], "stats_groups": 2}

    return tensors, rebuild


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_gradcheck(silu, per_sample):
    x, weight, options = make((2, 4, 2, 3, 3), torch.float64)
    options = double(options) | {"norm": double(options["norm"])._replace(silu=silu)}
    options["bias"] = options["bias"] if per_sample else options["bias"][0]
    tensors, rebuild = flat(options)
    tensors = [t.double().detach().requires_grad_() for t in (x, weight, *tensors)]

    def run(x, weight, *rest):
        return conv3x3(x, weight, **rebuild(*rest))[0]

    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, w: conv3x3(x, w)[0], tensors[:2], check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: run(x, *tensors[1:]), tensors[0], check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_against_float64(isa, dtype, channels_last, accurate):
    x, weight, options = make(SHAPES[0], dtype, channels_last)
    tensors, rebuild = flat(options)
    tensors = [t.requires_grad_() for t in (x, weight, *tensors)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    dy = torch.randn(2, 24, 8, 8).to(dtype)

    def gradients(fn, tensors, dy):
        return torch.autograd.grad(fn(*tensors[:2], **rebuild(*tensors[2:]))[0], tensors, dy)

    got, plain = gradients(conv3x3, tensors, dy), gradients(textbook, tensors, dy)
    truth = gradients(textbook, exact, dy.double())
    for name, g, p, t in zip(NAMES, got, plain, truth, strict=True):
        # What enters the norm's backward is rounded to dtype; its sums of up to 2 x 64 terms then cancel.
        floor = 16 * torch.finfo(dtype).eps * t.abs().max().item() / 4 if name in ("add", "x") else 0.0
        accurate(g, p, t, floor)
    assert got[0].stride() == x.stride()


def test_functorch_agrees_with_forward_ad():
    x, weight, options = make(SHAPES[1])
    options["stats_groups"] = 2
    dx, dw = torch.randn_like(x), torch.randn_like(weight)

    def run(fn):
        return lambda x, w: fn(x, w, **options)[0]

    def dual(x, w):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(conv3x3)(forward_ad.make_dual(x, dx), forward_ad.make_dual(w, dw))).tangent

    exact = torch.func.jvp(
        lambda x, w: textbook(x, w, **double(options))[0], (x.double(), weight.double()), (dx.double(), dw.double())
    )[1]
    for got in (
        torch.func.jvp(run(conv3x3), (x, weight), (dx, dw))[1],
        dual(x, weight),
        torch.compile(dual, fullgraph=True)(x, weight),
    ):
        torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.func.grad(lambda x, fn=fn: run(fn)(x, weight).square().sum())(x) for fn in (conv3x3, textbook))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    x, weight, options = make((2, 4, 2, 3, 5), dtype, channels_last)
    norm = options["norm"]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if dtype in (torch.bfloat16, torch.float16):  # the aot test compares gradients more tightly than these types allow
        tests = tests[:3]
    for arguments in (
        (*norm[:8], True, options["residual"], 0.7, 2, None, "direct"),
        (None, None, 1, 1e-5, None, None, None, None, True, None, 1.0, 0, weight.clone(), "direct"),
    ):
        inputs = (x.requires_grad_(), weight.requires_grad_(), options["bias"], *arguments)
        torch.library.opcheck(torch.ops.fastdiff.conv3x3.default, inputs, test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    x, weight, options = make(SHAPES[0])
    tensors, rebuild = flat(options)
    tensors = [t.requires_grad_() for t in (x, weight, *tensors)]

    def loss(x, weight, *rest):
        y, stats = conv3x3(x, weight, **rebuild(*rest))
        return y.square().sum() + stats.sum()

    eager, compiled = loss(*tensors), torch.compile(loss, fullgraph=True, dynamic=dynamic)(*tensors)
    torch.testing.assert_close(compiled, eager)
    pairs = torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors)
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (2, 4, 2, 0, 3), (2, 4, 2, 3, 0)])
def test_empty(shape):
    x, weight, options = make(shape)
    options["stats_groups"] = 2
    y, stats = conv3x3(x.requires_grad_(), weight.requires_grad_(), **options)
    assert y.shape == (shape[0], 2, *shape[3:]) and stats.shape == (shape[0], 2, 2)
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape and (dw == 0).all()


def test_views(accurate):
    x, weight, _ = make((4, 16, 8, 10, 12))
    for view in (x[:, ::2], x[:, 4:12, ::2, 1::3], x.transpose(2, 3)[:, :8], x[:1, :8].expand(4, -1, -1, -1)):
        norm = Norm(torch.ones(8), torch.zeros(8), 2)
        y, _ = conv3x3(view, weight[:, :8], norm=norm)
        accurate(
            y,
            textbook(view, weight[:, :8], norm=norm)[0],
            textbook(view.double(), weight[:, :8].double(), norm=double(norm))[0],
        )


def test_what_serves_it_is_said():
    served = implementations()["conv3x3"]
    assert served["cuda"].name in ("triton", "composed")
    assert served["cpu"].name.startswith("c++") or served["cpu"].name == "composed"
    assert "conv3x3 by direct" in report()


@pytest.mark.skipif("not __import__('fastdiff.ops').ops._register.native_error is None", reason="fastdiff._C is not built")
def test_strict_mode_allows_what_is_composed_of_kernels():
    code = (
        "import torch; from fastdiff.ops import Norm, conv3x3\n"
        "x, w = torch.randn(1, 4, 3, 3), torch.randn(2, 4, 3, 3)\n"
        "print(conv3x3(x, w, norm=Norm(torch.ones(4), torch.zeros(4), 2), stats_groups=2)[0].shape)"
    )
    environment = {**os.environ, "FASTDIFF_STRICT": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "torch.Size([1, 2, 3, 3])" in run.stdout, run.stderr


GOOD = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(6, 8, 3, 3)}
NORM = Norm(torch.ones(8), torch.zeros(8), 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(8, 4, 4)}, r"x: expected a floating-point tensor \[N, I, H, W\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, "x: expected a floating-point tensor"),
        ({"weight": torch.zeros(6, 7, 3, 3)}, r"weight: \(6, 7, 3, 3\) does not fit x .* expected \(6, 8, 3, 3\)"),
        ({"weight": torch.zeros(6, 8, 1, 1)}, "weight: .* does not fit x"),
        ({"weight": torch.zeros(0, 8, 3, 3)}, "weight: .* does not fit x"),
        ({"weight": torch.tensor(1.0)}, "weight: .* does not fit x"),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.int8)}, "weight: expected a floating-point tensor, got torch.int8"),
        ({"bias": torch.zeros(5)}, r"bias: \(5,\) does not fit x .* expected \(6,\) or \(2, 6\)"),
        ({"bias": torch.zeros(6, device="meta")}, "bias: is on meta, x on cpu"),
        ({"residual": torch.zeros(2, 6, 4, 5)}, "residual: .* does not fit x"),
        ({"residual": torch.zeros(2, 6, 4, 4).half()}, "residual: is torch.float16, x torch.float32"),
        ({"norm": NORM._replace(groups=3)}, "norm.groups: 3 does not divide the 8 channels"),
        ({"norm": NORM._replace(add=torch.zeros(2, 6))}, "norm.add: .*does not fit x"),
        ({"stats_groups": 4}, "stats_groups: 4 does not divide the 6 channels of y"),
        ({"stats_groups": -1}, "stats_groups: -1 does not divide"),
        ({"algorithm": "fft"}, "algorithm: 'fft' is not known here; use direct"),
        ({"packed": [1]}, "packed: expected a floating-point tensor, got list"),
        ({"packed": torch.zeros(6, 8, 3, 3, dtype=torch.int16)}, "packed: expected a floating-.* got torch.int16"),
        ({"weight": torch.zeros(6, 8, 3, 3, dtype=torch.int16)}, "weight: expected a floating-.* got torch.int16"),
        ({"bias": torch.zeros(6, dtype=torch.int16)}, "bias: expected a floating-point tensor, got torch.int16"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        conv3x3(**(GOOD | change))


def test_errors_of_packing():
    with pytest.raises(TypeError, match=r"weight: expected a floating-point tensor \[O, I, 3, 3\]"):
        conv3x3_pack(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="algorithm: 'fft' is not known"):
        conv3x3_pack(GOOD["weight"], "fft")

"""resample: values against zero insertion and conv2d, derivatives of any order, layouts, sizes, pads, errors."""

import itertools
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional

from fastdiff.ops import resample, resample_pads
from fastdiff.ops._layout import image

module = sys.modules["fastdiff.ops.resample"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BOX, LINEAR = (1.0, 1.0), (1.0, 3.0, 3.0, 1.0)
# (taps, up, down, pad): what the networks use; their gradients' pads; filtering alone; three phases; decimation that drops a
# remainder; both at once; one tap; more zeros than taps; crops; pads beyond the filter, where results are zero; many taps.
CASES = [
    (BOX, 2, 1, (1, 0)),
    (BOX, 1, 2, (0, 0)),
    (LINEAR, 2, 1, (2, 1)),
    (LINEAR, 1, 2, (1, 1)),
    (LINEAR, 1, 1, (2, 2)),
    ((1.0, -2.0, 0.5), 3, 1, (2, 1)),
    ((1.0, -2.0, 0.5), 1, 3, (1, 1)),
    ((0.2, 0.4, 0.1, 0.3, 0.7), 3, 2, (4, 3)),
    ((2.0,), 1, 1, (0, 0)),
    ((0.5, 2.0), 5, 2, (3, 4)),
    (LINEAR, 2, 1, (-1, -2)),
    (LINEAR, 1, 2, (-1, 3)),
    (LINEAR, 1, 1, (9, 7)),
    (tuple(0.1 * k - 0.4 for k in range(9)), 2, 1, (5, 4)),
    (tuple(0.1 * k - 0.4 for k in range(9)), 1, 1, (4, 4)),
]
# Odd sides and channels that end inside a vector; sides of a level of the networks; one pixel.
SHAPES = [(2, 5, 7, 6), (1, 35, 9, 11), (2, 3, 5, 40), (1, 32, 16, 16), (3, 2, 1, 1)]


def textbook(x, taps, up, down, pad):
    """Zeros inserted, padded, convolved in two dimensions at once with the outer product, decimated."""
    n, c, h, w = x.shape
    z = x.new_zeros(n, c, h, up, w, up)
    z[:, :, :, 0, :, 0] = x
    z = functional.pad(z.reshape(n * c, 1, h * up, w * up), (*pad, *pad))
    y = functional.conv2d(z, torch.outer(taps, taps).flip(0, 1)[None, None])[..., ::down, ::down]
    return y.reshape(n, c, *y.shape[2:])


def make(shape, dtype=torch.float32, channels_last=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def fits(shape, taps, up, down, pad):
    return all(up * side + sum(pad) >= len(taps) for side in shape[2:])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(isa, dtype, channels_last, accurate):
    for shape, (taps, *rest) in itertools.product(SHAPES, CASES):
        if fits(shape, taps, *rest):
            x, filter = make(shape, dtype, channels_last), torch.tensor(taps)
            y = resample(x, filter, *rest)
            truth = textbook(x.double(), filter.double(), *rest)
            size = truth.shape[2:]
            plain = module.reference(x, filter, *rest[:2], rest[2][0], *size)
            assert y.stride() == plain.stride() and y.is_contiguous(memory_format=torch.channels_last) >= channels_last
            accurate(plain, plain, truth)
            accurate(y, plain, truth)


def test_is_what_the_networks_do(isa):
    x = make((2, 6, 8, 12))
    box, linear = torch.tensor(BOX), torch.tensor(LINEAR)
    doubled = resample(x, box, up=2, pad=resample_pads(2, up=2))
    assert torch.equal(doubled, functional.interpolate(x, scale_factor=2, mode="nearest"))
    halved = resample(x, box / 2, down=2, pad=resample_pads(2, down=2))
    torch.testing.assert_close(halved, functional.avg_pool2d(x, 2))
    # EDM: transposed and ordinary depthwise convolution with the outer product, padding (T - 1) // 2
    depthwise = torch.outer(linear, linear)[None, None].expand(6, 1, 4, 4) / 64
    doubled = resample(x, linear / 4, up=2, pad=resample_pads(4, up=2))
    torch.testing.assert_close(doubled, functional.conv_transpose2d(x, depthwise * 4, stride=2, padding=1, groups=6))
    halved = resample(x, linear / 8, down=2, pad=resample_pads(4, down=2))
    torch.testing.assert_close(halved, functional.conv2d(x, depthwise, stride=2, padding=1, groups=6))
    # NCSN++'s pyramid: filter and halving convolution in one, 2 zeros on either side
    weight = torch.randn(4, 6, 3, 3)
    fused = functional.conv2d(resample(x, linear / 8, pad=resample_pads(4, down=2, kernel=3)), weight, stride=2)
    filtered = functional.conv2d(functional.pad(x, (2, 2, 2, 2)), depthwise, groups=6)
    assert fused.shape == (2, 4, 4, 6)
    torch.testing.assert_close(fused, functional.conv2d(filtered, weight, stride=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("up, down", [(2, 1), (3, 1), (1, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("count", range(1, 8))
def test_pads_keep_the_ratio(count, up, down):
    x = make((1, 1, 12, 18))
    y = resample(x, torch.ones(count), up, down, resample_pads(count, up, down))
    assert y.shape[2:] == (12 * up // down, 18 * up // down)
    before_convolution = resample(x, torch.ones(count), up, 1, resample_pads(count, up, down, kernel=3))
    assert functional.conv2d(before_convolution, torch.ones(1, 1, 3, 3), stride=down).shape == y.shape


def test_pads_center_the_filter():
    x = make((1, 1, 8, 8))
    for count, up, down in ((2, 2, 1), (4, 2, 1), (6, 2, 1), (2, 1, 2), (4, 1, 2), (3, 1, 1), (3, 3, 1)):
        run = {"taps": torch.ones(count), "up": up, "down": down, "pad": resample_pads(count, up, down)}
        torch.testing.assert_close(resample(x.flip(3), **run).flip(3), resample(x, **run))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 3, 0, 4), (2, 3, 4, 0), (1, 2, 0, 0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty(isa, shape, channels_last):
    for taps, up, down, pad in CASES:
        if all(side == 0 or up * side + sum(pad) >= len(taps) for side in shape[2:]):
            y = resample(make(shape, channels_last=channels_last), torch.tensor(taps), up, down, pad)
            # A side of 0 has only its pads, if they hold the filter: zeros.
            assert y.shape[:2] == shape[:2] and (y == 0).all()
            assert y.shape[2] == max(0, (up * shape[2] + sum(pad) - len(taps)) // down + 1)


def test_views(isa):
    x = make((4, 12, 10, 16))
    last = make((4, 12, 10, 16), channels_last=True)
    views = [t for base in (x, last) for t in (base[:, 2:7], base[:, :, ::2, 1::3], base.transpose(2, 3), base[:, ::2])]
    views += [x[:1].expand(4, -1, -1, -1), x.permute(0, 3, 1, 2), x[..., :1, :1], last[:, :1], last[:, 3:4, 1:, 2:]]
    for view in views:
        for taps, up, down, pad in CASES[:5]:
            if fits(view.shape, taps, up, down, pad):
                filter = torch.tensor(taps)
                y = resample(view, filter, up, down, pad)
                truth = textbook(view.double(), filter.double(), up, down, pad)
                torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-5)
                assert y.stride() == image(view, *y.shape[1:]).stride()
    filter = torch.tensor([1.0, 9.0, 3.0, 9.0])[::2]  # taps may be a view too
    assert torch.equal(resample(x, filter, down=2), resample(x, filter.clone(), down=2))
    assert torch.equal(resample(x, filter.double(), down=2), resample(x, filter.bfloat16(), down=2))


def test_not_a_number_stays_where_its_taps_are(isa):
    for channels_last in (False, True):
        x = make((1, 4, 8, 40), channels_last=channels_last)
        x[0, 1, 3, 17] = float("nan")
        y = resample(x, torch.tensor(LINEAR), 2, 1, (2, 1)).isnan()
        assert y.sum() == 16 and y[0, 1, 5:9, 33:37].all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_and_batch_do_not_change_bits(isa, channels_last):
    x, filter = make((3, 24, 40, 33), channels_last=channels_last), torch.tensor(LINEAR)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(resample(x, filter, 2, 1, (2, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])
    assert torch.equal(resample(x[1:2], filter, 2, 1, (2, 1))[0], results[0][1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_derivatives(channels_last):
    x = make((2, 3, 5, 4), torch.float64, channels_last).requires_grad_()
    for taps, *rest in CASES:
        if fits(x.shape, taps, *rest):

            def run(x, taps=taps, rest=rest):
                return resample(x, torch.tensor(taps), *rest)

            assert torch.autograd.gradcheck(run, x, check_forward_ad=True, fast_mode=True)
            assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_values(isa, dtype, channels_last, accurate):
    for shape, (taps, *rest) in itertools.product(SHAPES[:3], CASES):
        if fits(shape, taps, *rest):
            x, filter = make(shape, dtype, channels_last).requires_grad_(), torch.tensor(taps)
            exact = x.detach().double().requires_grad_()
            y, truth = resample(x, filter, *rest), textbook(exact, filter.double(), *rest)
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)
            (expected,) = torch.autograd.grad(truth, exact, dy.double())
            up, down, pad = rest
            plain = module.reference(dy, filter.flip(0), down, up, len(taps) - 1 - pad[0], *shape[2:])
            accurate(dx, plain, expected)


def test_functorch_agrees_with_forward_ad():
    x, filter = make((2, 3, 5, 4)), torch.tensor(LINEAR)
    tangent = torch.randn_like(x)

    def run(x):
        return resample(x, filter, 2, 1, (2, 1))

    def dual(x, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent)).square()).tangent

    _, got = torch.func.jvp(lambda x: run(x).square(), (x,), (tangent,))
    exact = textbook(x.double(), filter.double(), 2, 1, (2, 1)), textbook(tangent.double(), filter.double(), 2, 1, (2, 1))
    torch.testing.assert_close(got, (2 * exact[0] * exact[1]).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dual(x, tangent), got)
    torch.testing.assert_close(torch.compile(dual, fullgraph=True)(x, tangent), got)
    total = torch.func.grad(lambda x: run(x).square().sum())
    exact = torch.func.grad(lambda x: textbook(x, filter.double(), 2, 1, (2, 1)).square().sum())(x.double())
    # A gradient adds 16 products of up to 9 |y|, |y| up to 100: terms of 10^3 that may cancel.
    torch.testing.assert_close(total(x), exact.float(), rtol=1e-5, atol=1e-3)
    # forward over reverse, as in a Hessian's product with a vector
    torch.testing.assert_close(torch.func.jvp(total, (x,), (tangent,))[1], total(tangent), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    x = make((2, 3, 5, 4), dtype, channels_last).requires_grad_()
    for up, down, p0, *size in ((2, 1, 2, 10, 8), (1, 2, 1, 2, 2), (1, 1, -1, 1, 1)):
        torch.library.opcheck(torch.ops.fastdiff.resample.default, (x, torch.tensor(LINEAR), up, down, p0, *size))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    x, filter = make((2, 3, 6, 4)).requires_grad_(), torch.tensor(LINEAR)

    def loss(x, filter):
        halved = resample(x, filter, down=2, pad=resample_pads(4, down=2))
        return resample(halved, filter, up=2, pad=resample_pads(4, up=2)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for value in (x, make((1, 3, 8, 10)).requires_grad_()):
        eager, got = loss(value, filter), compiled(value, filter)
        torch.testing.assert_close(got, eager)
        torch.testing.assert_close(torch.autograd.grad(got, value), torch.autograd.grad(eager, value))


GOOD = {"x": torch.zeros(2, 3, 4, 4), "taps": torch.ones(4), "up": 1, "down": 1, "pad": (1, 1)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x: expected a floating-point tensor \[N, C, H, W\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "x: expected a floating-point tensor"),
        ({"taps": torch.ones(2, 2)}, r"taps: expected a floating-point tensor \[T\], got .*\(2, 2\)"),
        ({"taps": torch.ones(4, dtype=torch.int64)}, "taps: expected a floating-point tensor"),
        ({"taps": [1, 1]}, "taps: expected a floating-point tensor .* got list"),
        ({"taps": torch.ones(0)}, "taps: 0 taps"),
        ({"taps": torch.ones(4, device="meta")}, "taps: is on meta, x on cpu"),
        ({"taps": torch.ones(4, requires_grad=True)}, "taps: requires grad .* pass taps.detach"),
        ({"up": 0}, "up: 0 is not in 1 ... 65536"),
        ({"up": 2.0}, "up: expected a whole number, got float"),
        ({"down": -1}, "down: -1 is not in"),
        ({"down": 2**17}, "down: 131072 is not in"),
        ({"pad": (1,)}, "pad: expected two whole numbers"),
        ({"pad": (1, 0.5)}, "pad: expected two whole numbers"),
        ({"pad": (2**40, 0)}, "pad: .* is beyond"),
        ({"pad": (-2, -2)}, r"pad: \(-2, -2\) leaves no pixel of a side of 4 .* p0 \+ p1 >= 0 does"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        resample(**(GOOD | change))


def test_a_filter_with_a_tangent_is_refused():
    taps, x = torch.ones(4), GOOD["x"]
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"taps: .*derivative is not defined"):
        resample(x, forward_ad.make_dual(taps, taps), pad=(1, 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3, 4, 4), torch.ones(2), 1, 1, 0, 4, 4), r"x: expected \[N, C, H, W\]"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(2, 2), 1, 1, 0, 4, 4), r"taps: expected \[T\]"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(0), 1, 1, 0, 4, 4), r"taps: expected \[T\]"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(2), 0, 1, 0, 4, 4), "up: 0 is not in"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(2), 1, 2**40, 0, 4, 4), "down: .* is not in"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(2), 1, 1, -(2**62), 4, 4), "p0: .* is beyond"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(2), 1, 1, 0, -4, 4), "height, width: not in"),
        ((torch.zeros(1, 3, 4, 4, dtype=torch.int32), torch.ones(2), 1, 1, 0, 4, 4), "x: only float32"),
        ((torch.zeros(1, 3, 4, 4), torch.ones(2, dtype=torch.int32), 1, 1, 0, 4, 4), "taps: only float32"),
    ],
)
def test_errors_below_the_wrapper(isa, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdiff.resample(*arguments)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(data):
    """Whatever comes: the textbook's values, or one of our errors."""
    small = st.integers(-1, 5)
    x = torch.randn(data.draw(st.lists(st.integers(0, 6), min_size=3, max_size=5)))
    x = x.to(data.draw(st.sampled_from([*DTYPES, torch.int32])))
    if x.dim() == 4:
        x = x.permute(data.draw(st.permutations(range(4))))[:, :, :: data.draw(st.integers(1, 2))]
    taps = torch.randn(data.draw(st.integers(0, 6)), dtype=data.draw(st.sampled_from(DTYPES)))
    up, down, pad = data.draw(small), data.draw(small), (data.draw(st.integers(-4, 6)), data.draw(st.integers(-4, 6)))
    try:
        y = resample(x, taps, up, down, pad)
    except (TypeError, ValueError) as error:
        assert str(error).split(":")[0] in ("x", "taps", "up", "down", "pad")
        return
    assert y.dtype == x.dtype
    if x.numel() and y.numel():
        truth = textbook(x.double(), taps.double(), up, down, pad)
        largest = truth.abs().max().item() + taps.double().abs().sum().item() ** 2 * x.double().abs().max().item()
        assert (y.double() - truth).abs().max().item() <= 2 * torch.finfo(x.dtype).eps * largest + 1e-5 * largest * (
            x.dtype != torch.float64
        )

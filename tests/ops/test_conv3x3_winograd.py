"""conv3x3 by Winograd's algorithm: values with a tolerance of its own error analysis, statistics, bits, packing."""

import itertools
import sys

import pytest
import torch
from test_conv3x3 import OPTIONS, double, make, textbook
from torch.nn import functional
from winograd_error import by_tiles, hidden, tiles_of, tolerance

from fastdiff.ops import Norm, _winograd, conv3x3, conv3x3_algorithms, conv3x3_pack, conv3x3_weight_gradient

module = sys.modules["fastdiff.ops.conv3x3"]
pytestmark = pytest.mark.skipif(len(conv3x3_algorithms(torch.float32)) == 1, reason="fastdiff._C is not built")

SERVED = [("winograd4", torch.float32), ("winograd4_lean", torch.float32), ("winograd4", torch.bfloat16)]
WITH_ISA = [*SERVED[:3], ("winograd4_lean", torch.float16), ("winograd6", torch.float32)]
WITH_ISA += [("winograd4_int16", torch.bfloat16)]
SERVED += [(name, torch.float32) for name in conv3x3_algorithms(torch.float32)[3:]]
SERVED += [(name, torch.bfloat16) for name in conv3x3_algorithms(torch.bfloat16)[3:]]
# n, inputs, outputs, height, width: a level; odd sides and channels; one pixel; first and last layer; less than a tile;
# several slabs of one image; blocks of output channels cut short.
SHAPES = [
    (2, 16, 24, 8, 8),
    (3, 6, 4, 5, 7),
    (2, 8, 8, 1, 1),
    (1, 3, 16, 6, 4),
    (1, 1, 1, 3, 9),
    (1, 48, 3, 7, 7),
    (2, 33, 80, 2, 14),
    (1, 17, 130, 28, 28),
    (1, 4, 6, 37, 41),
    (5, 8, 20, 4, 4),
]


SUBSETS = [set(), *({o} for o in OPTIONS), set(OPTIONS)]


def check_values(algorithm, dtype, channels_last, shapes, subsets):
    for shape, only in itertools.product(shapes, subsets):
        x, weight, options = make(shape, dtype, channels_last, only)
        if "stats_groups" in options:
            options["stats_groups"] = 4 if shape[2] % 4 == 0 else 1
        weight = weight.to(dtype).float()
        packed = conv3x3_pack(weight, algorithm)
        y, stats = conv3x3(x, weight, **options, packed=packed, algorithm=algorithm)
        truth, exact = textbook(x.double(), weight.double(), **double(options))
        h = hidden(x.double(), double(options).get("norm"))
        allowed = tolerance(algorithm, dtype, h, weight, options.get("out_scale", 1.0), truth.abs().max().item())
        error = (y.double() - truth).abs().max().item()
        assert error <= allowed, f"{shape} {only}: error {error:.3g}, allowed {allowed:.3g}"
        form = torch.channels_last if channels_last else torch.contiguous_format
        assert y.dtype == dtype and (y.is_contiguous(memory_format=form) or min(y.shape) == 1)
        if "stats_groups" in only:
            scale = truth.square().mean().sqrt().item()
            torch.testing.assert_close(stats[..., 0].double(), exact[..., 0], rtol=0, atol=allowed)
            torch.testing.assert_close(stats[..., 1].double(), exact[..., 1], rtol=0, atol=2 * scale * allowed + allowed**2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("algorithm, dtype", SERVED)
def test_values(algorithm, dtype, channels_last):
    check_values(algorithm, dtype, channels_last, SHAPES, [set(), set(OPTIONS)])
    check_values(algorithm, dtype, channels_last, SHAPES[:2], SUBSETS)


@pytest.mark.parametrize("algorithm, dtype", WITH_ISA)
def test_values_of_every_instruction_set(isa, algorithm, dtype):
    if algorithm not in conv3x3_algorithms(dtype):
        x = torch.randn(1, 4, 4, 4).to(dtype)
        with pytest.raises(ValueError, match=f"algorithm: '{algorithm}' is not served for {dtype} on cpu; use direct"):
            conv3x3(x, torch.randn(2, 4, 3, 3), algorithm=algorithm)
        return
    check_values(algorithm, dtype, True, SHAPES, [set(OPTIONS)])
    check_values(algorithm, dtype, False, SHAPES[1:4], [set()])


@pytest.mark.parametrize("algorithm, dtype", SERVED[:2] + SERVED[3:])
def test_deep_layers(algorithm, dtype):
    # more input channels than one run of sums, and the last run short
    check_values(algorithm, dtype, True, [(1, 600, 70, 4, 5), (1, 1100, 16, 8, 8)], [set()])


def test_error_at_the_layer_that_others_are_measured_at():
    x, weight = torch.randn(1, 256, 32, 32), torch.randn(256, 256, 3, 3) / 48
    truth = functional.conv2d(x.double(), weight.double(), padding=1)
    for algorithm in conv3x3_algorithms(torch.float32)[1:]:
        y, _ = conv3x3(x, weight, algorithm=algorithm)
        most = 3e-6 if algorithm == "winograd6" else 1.7e-6  # ncnn's F(4, 3), and not twice that
        assert (y - truth).norm() / truth.norm() < most
    x, weight = x.bfloat16(), weight.bfloat16()
    truth = functional.conv2d(x.double(), weight.double(), padding=1)
    plain = (functional.conv2d(x, weight, padding=1) - truth).norm()
    # Of the result's own rounding. winograd2: this layer alone; a network's output: below 2.
    for algorithm, most in {"winograd2": 3, "winograd4_int16": 1.15}.items():
        if algorithm in conv3x3_algorithms(torch.bfloat16):
            assert (conv3x3(x, weight, algorithm=algorithm)[0] - truth).norm() < most * plain


@pytest.mark.parametrize("algorithm, dtype", SERVED)
@pytest.mark.parametrize("side", [2, 7, 13, 40])
def test_bits_depend_on_neither_batch_nor_threads(algorithm, dtype, side):
    x, weight, options = make((5, 20, 72, side, side), dtype, True)
    packed = conv3x3_pack(weight, algorithm)
    threads = torch.get_num_threads()

    def run(batch):
        def cut(t):
            return t[batch] if isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[0] == 5 else t

        norm = Norm(*(cut(t) if i > 3 else t for i, t in enumerate(options["norm"])))
        given = {k: cut(t) for k, t in options.items()} | {"norm": norm}
        return conv3x3(x[batch], weight, **given, packed=packed, algorithm=algorithm)

    try:
        y, stats = run(slice(0, 5))
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for batch in (slice(0, 5), slice(0, 1), slice(3, 5)):
                again, moments = run(batch)
                assert torch.equal(again, y[batch]) and torch.equal(moments, stats[batch])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("inputs", [20, 300])  # 300: two runs of sums
def test_few_tiles_have_the_bits_that_each_has_alone(isa, inputs):
    x, weight = torch.randn(9, inputs, 3, 4), torch.randn(24, inputs, 3, 3) / (3 * inputs**0.5)  # an image is a tile
    packed = conv3x3_pack(weight, "winograd4_lean")

    def run(part):
        return conv3x3(part, weight, packed=packed, algorithm="winograd4_lean")[0]

    alone = torch.cat([run(image) for image in x.split(1)])
    truth = functional.conv2d(x.double(), weight.double(), padding=1)
    allowed = tolerance("winograd4_lean", torch.float32, x, weight, 1, truth.abs().max().item())
    assert (alone - truth).abs().max() <= allowed
    for tiles in range(2, 10):
        assert torch.equal(run(x[:tiles]), alone[:tiles])


def test_statistics_of_images_far_from_zero():
    x, weight = torch.randn(2, 16, 12, 12), torch.randn(32, 16, 3, 3) / 12
    y, stats = conv3x3(x, weight, torch.full((32,), 1e3), stats_groups=4, algorithm="winograd4")
    torch.testing.assert_close(stats, module.statistics(y.double(), None, 4).float(), rtol=1e-4, atol=0)


def test_given_statistics_of_x():
    x, weight, options = make(SHAPES[0])
    norm = options["norm"]
    given = module.statistics(x, norm.add, norm.groups) + 0.5
    got = conv3x3(x, weight, norm=norm._replace(stats=given), algorithm="winograd4")[0]
    torch.testing.assert_close(got, conv3x3(x, weight, norm=norm._replace(stats=given))[0], rtol=1e-4, atol=1e-5)


def test_views():
    x, weight, _ = make((4, 16, 8, 10, 12))
    norm = Norm(torch.ones(8), torch.zeros(8), 2)
    for view in (x[:, ::2], x[:, 4:12, ::2, 1::3], x.transpose(2, 3)[:, :8], x[:1, :8].expand(4, -1, -1, -1)):
        got, _ = conv3x3(view, weight[:, :8], norm=norm, residual=view, algorithm="winograd4")
        want, _ = conv3x3(view, weight[:, :8], norm=norm, residual=view)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.stride() == want.stride()
    wide = x.to(memory_format=torch.channels_last)[:, 4:12]  # channels of a wider buffer, as a concatenation has them
    got, _ = conv3x3(wide, weight[:, :8], norm=norm, algorithm="winograd4")
    torch.testing.assert_close(got, conv3x3(wide, weight[:, :8], norm=norm)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (2, 4, 2, 0, 3), (2, 4, 2, 3, 0)])
def test_empty(shape):
    x, weight, options = make(shape)
    options["stats_groups"] = 2
    y, stats = conv3x3(x, weight, **options, algorithm="winograd4")
    assert y.shape == (shape[0], 2, *shape[3:]) and stats.shape == (shape[0], 2, 2)


def test_gradients_read_the_weight():
    x, weight, options = make(SHAPES[0])
    packed = conv3x3_pack(weight, "winograd4")
    tensors = [x.requires_grad_(), weight.requires_grad_(), options["norm"].weight.requires_grad_()]
    dy = torch.randn(2, 24, 8, 8)
    got = torch.autograd.grad(conv3x3(x, weight, **options, packed=packed, algorithm="winograd4")[0], tensors, dy)
    torch.testing.assert_close(got, torch.autograd.grad(conv3x3(x, weight, **options)[0], tensors, dy))


@pytest.mark.parametrize("algorithm, dtype", SERVED)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(algorithm, dtype, channels_last):
    x, weight, options = make((2, 4, 2, 3, 5), dtype, channels_last)
    norm, packed = options["norm"], conv3x3_pack(weight, algorithm)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, weight, options["bias"], *norm[:8], True, options["residual"], 0.7, 2, packed, algorithm)
    torch.library.opcheck(torch.ops.fastdiff.conv3x3.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.fastdiff.conv3x3_pack.default, (weight, algorithm, False), test_utils=tests)


def test_compiles_as_one_graph():
    x, weight, options = make(SHAPES[0])
    packed = conv3x3_pack(weight, "winograd4")

    def run(x):
        y, stats = conv3x3(x, weight, **options, packed=packed, algorithm="winograd4")
        return y * 2, stats

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


def test_packed_weights_are_those_multiplied():
    x, weight, options = make(SHAPES[0])
    packed = conv3x3_pack(weight, "winograd4")
    stand_in = weight.new_full((1,), float("nan")).expand(weight.shape)
    y, _ = conv3x3(x, stand_in, packed=packed, algorithm="winograd4", **options)
    assert torch.equal(y, conv3x3(x, weight, algorithm="winograd4", **options)[0])


def test_the_transforms_are_those_of_the_formula():
    for algorithm in ("winograd4", "winograd6", "winograd2", "winograd4_int16"):
        x, weight = torch.randn(2, 3, 17, 9, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(by_tiles(x, weight, algorithm), functional.conv2d(x, weight, padding=1))


def test_tiles_have_the_fewest_points():
    sizes = {4: [4], 8: [4, 4], 16: [6, 6, 4], 28: [6] * 4 + [4], 32: [6] * 4 + [4] * 2, 64: [6] * 10 + [4]}
    assert {size: tiles_of("winograd6", size) for size in sizes} == sizes


def test_what_is_served(isa):
    integers, two, six = isa != "baseline", isa == "avx512_bf16", isa.startswith("avx512")
    assert conv3x3_algorithms(torch.float32) == ("direct", "winograd4", "winograd4_lean") + ("winograd6",) * six
    assert conv3x3_algorithms(torch.bfloat16)[3:] == ("winograd4_int16",) * integers + ("winograd2",) * two
    assert conv3x3_algorithms(torch.float64) == conv3x3_algorithms(torch.float32, "cuda") == ("direct",)
    x, weight = torch.randn(1, 4, 4, 4), torch.randn(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"algorithm: 'winograd4' is not served for torch.float64 on cpu"):
        conv3x3(x.double(), weight, algorithm="winograd4")
    with pytest.raises(ValueError, match=r"algorithm: 'winograd2' is not served for torch.float32 on cpu"):
        conv3x3(x, weight, algorithm="winograd2")
    args = (x.bfloat16(), weight, None, None, None, 1, 1e-5, None, None, None, None, True, None, 1.0, 0)
    for algorithm, needs, served in (("winograd2", "AVX512-BF16", two), ("winograd4_int16", "AVX2", integers)):
        if not served:
            with pytest.raises(RuntimeError, match=f"{algorithm} needs {needs}"):
                torch.ops.fastdiff.conv3x3(*args, conv3x3_pack(weight, algorithm), algorithm)
        with pytest.raises(RuntimeError, match=f"{algorithm} takes bfloat16 alone"):
            torch.ops.fastdiff.conv3x3(x, *args[1:], conv3x3_pack(weight, algorithm), algorithm)
    packed = conv3x3_pack(weight, "winograd6")
    with pytest.raises(RuntimeError, match="winograd6 takes float32 alone"):
        torch.ops.fastdiff.conv3x3(*args, packed, "winograd6")
    if not six:
        with pytest.raises(RuntimeError, match="winograd6 needs AVX-512, the instruction set in use is"):
            torch.ops.fastdiff.conv3x3(x, *args[1:], packed, "winograd6")


@pytest.mark.parametrize("packed_as", [*_winograd.ALGORITHMS[:-1], "other shape", "strided"])
def test_packed_must_belong(packed_as):
    x, weight = torch.randn(1, 4, 4, 4), torch.randn(2, 4, 3, 3)
    algorithm = "winograd4"
    if packed_as == "other shape":
        packed = conv3x3_pack(torch.randn(2, 5, 3, 3), algorithm)
    elif packed_as == "strided":
        packed = conv3x3_pack(weight, algorithm).transpose(1, 2).contiguous().transpose(1, 2)
    else:
        packed = conv3x3_pack(weight, packed_as)
        algorithm = "direct" if packed_as == "winograd4" else algorithm
    with pytest.raises(ValueError, match=f"packed: .* is not what conv3x3_pack.*{algorithm}.* pack again"):
        conv3x3(x, weight, packed=packed, algorithm=algorithm)
    if algorithm != "direct":
        args = (x, weight, None, None, None, 1, 1e-5, None, None, None, None, True, None, 1.0, 0, packed, algorithm)
        with pytest.raises(RuntimeError, match="packed: is not this weight's by winograd4"):
            torch.ops.fastdiff.conv3x3(*args)


# A weight's layouts: as stored, channels-last, of the way back, and views of wider ones.
LAYOUTS = {
    "rows": lambda o, i: torch.randn(o, i, 3, 3),
    "channels-last": lambda o, i: torch.randn(o, 3, 3, i).permute(0, 3, 1, 2),
    "transposed": lambda o, i: torch.randn(i, o, 3, 3).transpose(0, 1),
    "view": lambda o, i: torch.randn(o, 3, 3, 2 * i).permute(0, 3, 1, 2)[:, ::2],
}


@pytest.mark.parametrize("transposed", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_by_the_kernel_as_by_tensor_operations(layout, transposed):
    """Blocks of outputs whole, cut short and one; input channels that do not fill a line."""
    for outputs, inputs in ((64, 32), (100, 37), (3, 128), (17, 1), (1, 17), (128, 64)):
        weight = LAYOUTS[layout](outputs, inputs)
        for algorithm in ("winograd4_lean", "winograd6"):
            packed = conv3x3_pack(weight, algorithm, transposed)
            assert torch.equal(packed, _winograd._pack(weight, algorithm, transposed))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_what_training_runs(shape):
    """x's gradient is a Winograd convolution of dy, with that one's tolerance; the weight's has a file of its own."""
    x, weight, _ = make(shape, only=set())
    dy = torch.randn(shape[0], shape[2], *shape[3:])
    tensors = [t.requires_grad_() for t in (x, weight, torch.randn(shape[2]))]
    got = torch.autograd.grad(conv3x3(*tensors, algorithm="winograd4_lean")[0], tensors, dy)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(functional.conv2d(*exact, padding=1), exact, dy.double())
    back = weight.detach().transpose(0, 1).flip(2, 3)
    allowed = tolerance("winograd4_lean", torch.float32, dy, back, 1.0, truth[0].abs().max().item())
    assert (got[0] - truth[0]).abs().max() <= allowed
    assert torch.equal(got[1], conv3x3_weight_gradient(dy, x.detach()))
    sums = dy.numel() // shape[2] * 2.0**-24 * dy.double().abs().sum((0, 2, 3))  # of as many roundings
    assert ((got[2] - truth[2]).abs() <= sums).all()


def test_second_derivative_of_what_training_runs():
    """It is taken through the weight, which the packed copy would hide."""
    x, weight, _ = make(SHAPES[0], only=set())
    tensors = [x.requires_grad_(), weight.requires_grad_()]

    def penalty(convolve):
        (dx,) = torch.autograd.grad(convolve(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), tensors)

    got = penalty(lambda x, w: conv3x3(x, w, algorithm="winograd4_lean")[0])
    truth = penalty(lambda x, w: functional.conv2d(x, w, padding=1))
    for one, two in zip(got, truth, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * two.abs().max().item())

"""conv1x1: values by the bound of its sums, bits, layouts, packing, what is not the kernel's, errors."""

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import conv1x1, conv1x1_pack, conv1x1_serves
from fastdiff.ops.conv1x1 import _unpacked

# N, I, O, H, W: runs of pixels and a last one; blocks of outputs cut short; two panels of inputs; one of all.
SHAPES = [
    (2, 16, 64, 8, 8),
    (1, 3, 16, 5, 7),
    (3, 40, 80, 11, 9),
    (1, 300, 112, 14, 14),
    (1, 520, 128, 3, 1),
    (2, 1, 48, 1, 1),
]


def make(n, inputs, outputs, height, width, dtype=torch.float32):
    x = torch.randn(n, inputs, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(outputs, inputs), torch.randn(outputs)


def check(x, weight, bias, y):
    """Each of I products and as many additions rounds at most its sum's magnitude."""
    exact = functional.conv2d(x.double(), weight.double()[..., None, None], bias.double())
    bound = functional.conv2d(x.double().abs(), weight.double().abs()[..., None, None], bias.double().abs())
    rounding = torch.finfo(x.dtype).eps / 2
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y - exact).abs() <= (weight.shape[1] + 2) * rounding * bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(isa, shape):
    x, weight, bias = make(*shape)
    packed = conv1x1_pack(weight)
    y = conv1x1(x, packed, bias)
    check(x, weight, bias, y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert conv1x1_serves() == _built()


def _built():
    try:
        from fastdiff import _C  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:])
def test_other_types(dtype):
    x, weight, bias = make(2, 24, 32, 5, 6, dtype)
    check(x, weight.to(dtype), bias.to(dtype), conv1x1(x, conv1x1_pack(weight), bias))


def test_layouts():
    """Contiguous, channels of a wider image, every second pixel: a copy where channels are not next to each other."""
    x, weight, bias = make(3, 20, 32, 6, 8)
    packed = conv1x1_pack(weight)
    wide = torch.randn(3, 50, 6, 8).contiguous(memory_format=torch.channels_last)
    for view in (
        x.contiguous(),
        wide[:, 15:35],
        wide[:, ::2][:, :20],
        x[..., ::2],
        x.transpose(2, 3),
        x[:1].expand(3, -1, -1, -1),
    ):
        check(view, weight, bias, conv1x1(view, packed, bias))


@pytest.mark.skipif(not _built(), reason="fastdiff._C is not built")
def test_bits_depend_on_neither_batch_nor_threads():
    x, weight, bias = make(5, 300, 80, 13, 17)
    packed, threads = conv1x1_pack(weight), torch.get_num_threads()
    y = conv1x1(x, packed, bias)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for part in (slice(0, 5), slice(0, 1), slice(3, 5)):
                assert torch.equal(conv1x1(x[part], packed, bias), y[part])
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_pixel():
    x, weight, bias = make(1, 20, 32, 9, 9)
    packed = conv1x1_pack(weight)
    y = conv1x1(x, packed, bias)
    x[0, 3, 4, 4] = float("nan")
    spoilt = conv1x1(x, packed, bias)
    assert spoilt[0, :, 4, 4].isnan().all()
    spoilt[0, :, 4, 4] = y[0, :, 4, 4]
    assert torch.equal(spoilt, y)


def test_packing_and_empty():
    for outputs in (16, 64, 80, 192):
        weight = torch.randn(outputs, 7)
        assert torch.equal(_unpacked(conv1x1_pack(weight)), weight.mT)
    weight, bias = torch.randn(32, 4), torch.zeros(32)
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        assert conv1x1(torch.randn(shape), conv1x1_pack(weight), bias).shape == (shape[0], 32, *shape[2:])
    torch.library.opcheck(
        torch.ops.fastdiff.conv1x1.default,
        (torch.randn(2, 4, 3, 5), conv1x1_pack(weight), bias),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_bad_input():
    x, weight, bias = make(1, 4, 16, 3, 3)
    packed = conv1x1_pack(weight)
    with pytest.raises(
        ValueError, match=r"weight: expected floating-point \[O, I\] with O a multiple of 16, got .* \(5, 4\)"
    ):
        conv1x1_pack(torch.randn(5, 4))
    with pytest.raises(TypeError, match=r"x: expected .* \[N, I, H, W\]"):
        conv1x1(x[0], packed, bias)
    with pytest.raises(ValueError, match=r"packed: \(4, 16\) is not \[3, O\].* conv1x1_pack"):
        conv1x1(x[:, :3], packed, bias)
    with pytest.raises(ValueError, match=r"bias: \(8,\) does not fit packed"):
        conv1x1(x, packed, bias[:8])
    with pytest.raises(TypeError, match=r"packed: expected contiguous torch.float32 .* got torch.float64"):
        conv1x1(x, packed.double(), bias)
    if _built():
        with pytest.raises(RuntimeError, match="packed: expected"):
            torch.ops.fastdiff.conv1x1(x, packed, bias[:8])

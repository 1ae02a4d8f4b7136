"""The gradient of a convolution's weights by Winograd's algorithm: values by its error analysis, bits, layouts, errors."""

import pytest
import torch
from test_conv3x3_winograd import SHAPES
from torch.nn import functional
from winograd_error import matrices

from fastdiff import ops
from fastdiff.ops import conv3x3_weight_gradient
from fastdiff.ops.conv3x3_weight_gradient import reference

pytestmark = pytest.mark.skipif(len(ops.conv3x3_algorithms(torch.float32)) == 1, reason="fastdiff._C is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCHES = [(7, 20, 36, 8, 8), (3, 5, 70, 33, 9)]  # slabs of several images, the last of fewer; several slabs of an image


def make(n, inputs, outputs, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(n, outputs, height, width, generator=generator).to(dtype)
    h = torch.randn(n, inputs, height, width, generator=generator).to(dtype)
    return dy, h.contiguous(memory_format=torch.channels_last)


def bound(dy, h):
    """What rounding can amount to: (terms of a sum + roundings around it) eps times the sum of its terms' magnitudes."""
    at, g, bt = (t.abs() for t in matrices("winograd4_lean"))
    height, width = h.shape[2:]
    padded = functional.pad(h.double().abs(), (1, 1 + -width % 4, 1, 1 + -height % 4))
    v = bt @ padded.unfold(2, 6, 4).unfold(3, 6, 4) @ bt.T
    cut = functional.pad(dy.double().abs(), (0, -width % 4, 0, -height % 4))
    m = at.T @ cut.unfold(2, 4, 4).unfold(3, 4, 4) @ at
    sums = torch.einsum("noabpq,niabpq->oipq", m, v)
    tiles = v.shape[0] * v.shape[2] * v.shape[3]
    return (tiles + 30) * 2.0**-24 * (g.T @ sums @ g)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [*SHAPES, *BATCHES], ids=str)
def test_values(isa, shape, dtype):
    dy, h = make(*shape, dtype)
    dw, want = conv3x3_weight_gradient(dy, h), reference(dy.double(), h.double())
    assert dw.dtype == torch.float32 and dw.is_contiguous(memory_format=torch.channels_last)
    most = bound(dy, h)
    assert ((dw - want).abs() <= most).all()
    assert (dw - want).norm() <= 0.1 * most.norm()  # roundings seldom agree


@pytest.mark.parametrize("shape", [SHAPES[7], *BATCHES], ids=str)
def test_bits_do_not_depend_on_threads_or_layout(shape):
    dy, h = make(*shape)
    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got.append(conv3x3_weight_gradient(dy, h))
    finally:
        torch.set_num_threads(before)
    wide = torch.empty(*h.shape[:3], 2 * h.shape[3])[..., ::2].copy_(h)
    got.append(conv3x3_weight_gradient(dy.contiguous(memory_format=torch.channels_last), h.contiguous()))
    got.append(conv3x3_weight_gradient(dy, wide))
    assert all(torch.equal(got[0], other) for other in got[1:])


def test_what_a_convolution_learns():
    """Of the whole op, under the algorithm that trains, and by the library where a second derivative follows."""
    dy, h = make(2, 32, 40, 9, 9)
    weight = torch.randn(40, 32, 3, 3, requires_grad=True)
    y = ops.conv3x3(h, weight, algorithm="winograd4_lean")[0]
    first = torch.autograd.grad(y, weight, dy, retain_graph=True)[0]
    assert torch.equal(first, conv3x3_weight_gradient(dy, h))
    twice = torch.autograd.grad(y, weight, dy, create_graph=True)[0]
    torch.testing.assert_close(first, twice, rtol=1e-5, atol=1e-4)


def test_other_types_and_empty():
    dy, h = make(2, 4, 6, 5, 7, torch.float64)
    assert torch.equal(conv3x3_weight_gradient(dy, h), reference(dy, h))
    for n, inputs, outputs, height in [(0, 3, 4, 5), (2, 3, 4, 0), (2, 3, 0, 4)]:
        dw = conv3x3_weight_gradient(*make(n, inputs, outputs, height, 5))
        assert dw.shape == (outputs, inputs, 3, 3) and not dw.any()
    torch.library.opcheck(torch.ops.fastdiff.conv3x3_weight_gradient.default, make(2, 3, 5, 4, 6))


def test_bad_input():
    dy, h = make(2, 3, 4, 5, 6)
    with pytest.raises(TypeError, match=r"h: expected .* \[N, C, H, W\]"):
        conv3x3_weight_gradient(dy, h[0])
    with pytest.raises(ValueError, match=r"dy: .* does not fit h .* same"):
        conv3x3_weight_gradient(dy[:1], h)
    with pytest.raises(TypeError, match=r"dy: is torch.float64, h torch.float32; use dy.to\(torch.float32\)"):
        conv3x3_weight_gradient(dy.double(), h)

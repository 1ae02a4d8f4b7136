"""embedding: sines and cosines right to float32's rounding at every angle a time embedding meets, and its derivatives."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.nn import FourierEmbedding, PositionalEmbedding
from fastdiff.ops import embedding, frequencies

module = sys.modules["fastdiff.ops.embedding"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TURN = 2 * math.pi
# Half a unit in the last place of 1 for the result's rounding, as much for the angle's, and that of the polynomial's two
# last operations.
FLOAT32 = 2 * torch.finfo(torch.float32).eps


def inputs(batch, count, kind="positional"):
    generator = torch.Generator().manual_seed(batch + count)
    if kind == "positional":
        return torch.rand(batch, generator=generator) * 1000, frequencies(count)
    return torch.randn(batch, generator=generator) * 4, torch.randn(count, generator=generator) * 16


def plain(t, freqs, scale, sin_first, dtype):
    """What one writes in PyTorch: the angle in the type of t."""
    angle = torch.outer(t, freqs.to(t.dtype)) * scale
    halves = (angle.sin(), angle.cos())
    return torch.cat(halves if sin_first else halves[::-1], 1).to(dtype)


@pytest.mark.parametrize("kind, scale", [("positional", 1.0), ("fourier", TURN)])
@pytest.mark.parametrize("sin_first", [True, False])
def test_values(isa, kind, scale, sin_first, accurate):
    # Less than a vector, whole vectors, vectors and a rest; nothing at all.
    for batch, count in [(3, 64), (5, 61), (2, 1), (1, 3), (0, 8), (4, 0), (300, 16)]:
        t, f = inputs(batch, count, kind)
        truth = module.reference(t, f, scale, sin_first, torch.float64)
        got = embedding(t, f, sin_first, scale)
        accurate(got, plain(t, f, scale, sin_first, torch.float32), truth)
        if got.numel():
            assert (got - truth).abs().max() <= FLOAT32, "sharper than plain PyTorch, whose angle is rounded"


@pytest.mark.parametrize("of_t", DTYPES)
@pytest.mark.parametrize("of_freqs", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(isa, of_t, of_freqs, dtype, accurate):
    t, f = inputs(6, 21)
    t, f = t.to(of_t), f.to(of_freqs)
    truth = module.reference(t, f, 1.0, True, torch.float64)
    got = torch.ops.fastdiff.embedding(t, f, 1.0, True, dtype)
    accurate(got, module.reference(t, f, 1.0, True, dtype), truth, floor=FLOAT32 if of_t != torch.float64 else 0)


def test_angles_of_every_size(isa):
    """float32's rounding up to the largest float32, signs of zero, and what has no sine."""
    t = torch.tensor([0.0, -0.0, 1e-30, -1e-6, 0.785398, 1e3, -1e5, 1e8, 1e9, -1e12, 1e25, 3e38])
    f = torch.tensor([1.0, 0.3, -1.0, *[0.7] * 20])  # all lanes of a vector and a rest
    truth = module.reference(t, f, 1.0, True, torch.float64)
    got = embedding(t, f)
    assert (got - truth).abs().max() <= FLOAT32
    small = slice(2, 4)  # relative accuracy of the sine where it is small
    torch.testing.assert_close(got[small, :23].double(), truth[small, :23], rtol=FLOAT32, atol=0)
    bad = embedding(torch.tensor([math.inf, -math.inf, math.nan, 1.0]), f)
    assert bad[:3].isnan().all() and bad[3].isfinite().all()


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_rows_do_not_depend_on_the_batch(isa, batch):
    t, f = inputs(64, 61, "fourier")
    whole = embedding(t, f, scale=TURN)
    assert torch.equal(embedding(t[:batch], f, scale=TURN), whole[:batch])
    assert torch.equal(embedding(t[::3], f, scale=TURN), whole[::3]), "strided times"


def test_all_instruction_sets_agree(isa):
    from fastdiff import _C

    t, f = inputs(16, 61, "fourier")
    here = embedding(t, f)
    _C.use_isa("baseline")
    assert torch.equal(embedding(t, f), here)


def test_conventions_of_the_families():
    """DDPM and DDPM++ end at 1/10000 and have sines first; ADM stops before it and has cosines first; integers are times."""
    i = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(frequencies(4), (10000.0 ** (-i / 3)).float())
    torch.testing.assert_close(frequencies(4, freq_shift=0), (10000.0 ** (-i / 4)).float())
    assert frequencies(1).tolist() == [1.0] and frequencies(0).shape == (0,)
    t = torch.tensor([0, 37, 999])
    adm, ddpm = embedding(t, frequencies(8, freq_shift=0), sin_first=False), embedding(t, frequencies(8))
    assert adm.dtype == torch.float32
    torch.testing.assert_close(adm[:, 0], torch.tensor([0, 37.0, 999]).cos())
    torch.testing.assert_close(ddpm[:, 0], torch.tensor([0, 37.0, 999]).sin())
    assert torch.equal(ddpm[0], torch.tensor([0.0] * 8 + [1.0] * 8))


def test_modules():
    torch.manual_seed(0)
    t = torch.rand(5) * 1000
    positional = PositionalEmbedding(32, freq_shift=0.0, sin_first=False)
    assert torch.equal(positional(t), embedding(t, frequencies(16, freq_shift=0.0), sin_first=False))
    fourier = FourierEmbedding(32)
    # NCSN++ rounds its angles to float32, and a checkpoint trained so wants them so.
    angle = torch.outer(t[:2], 2 * math.pi * fourier.frequencies).double()
    assert (fourier(t[:2]) - torch.cat((angle.sin(), angle.cos()), 1)).abs().max() <= FLOAT32


@pytest.mark.parametrize("sin_first", [True, False])
def test_gradients(sin_first):
    t, f = (v.double().requires_grad_() for v in inputs(3, 5, "fourier"))

    def call(t, f):
        return embedding(t, f, sin_first, 0.25)

    assert torch.autograd.gradcheck(call, (t, f), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (t, f))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_derivatives_in_low_precision(isa, dtype, accurate):
    t, f = inputs(9, 33)
    t, f = t.requires_grad_(), f.requires_grad_()
    grad = torch.randn(9, 66, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(embedding(t, f, dtype=dtype), (t, f), grad)
    theirs = torch.autograd.grad(plain(t, f, 1.0, True, dtype), (t, f), grad)
    wide = [v.detach().double().requires_grad_() for v in (t, f)]
    truth = torch.autograd.grad(module.reference(*wide, 1.0, True, torch.float64), wide, grad.double())
    for a, b, c in zip(got, theirs, truth, strict=True):
        accurate(a, b, c)


def test_tangents_agree_everywhere():
    """torch.func.jvp, forward_ad eager and forward_ad compiled, against float64; and torch.func.grad of a tangent."""
    t, f = inputs(4, 9, "fourier")
    tangent = torch.randn(4, generator=torch.Generator().manual_seed(2))
    _, truth = torch.func.jvp(lambda t: embedding(t, f.double()), (t.double(),), (tangent.double(),))
    angle = torch.outer(t.double(), f.double())
    rate = torch.outer(tangent.double(), f.double())
    torch.testing.assert_close(truth, torch.cat((angle.cos() * rate, -angle.sin() * rate), 1))

    def forward_ad(t, tangent):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(t, tangent)
            return torch.autograd.forward_ad.unpack_dual(embedding(dual, f)).tangent

    _, functorch = torch.func.jvp(lambda t: embedding(t, f), (t,), (tangent,))
    for got in (functorch, forward_ad(t, tangent), torch.compile(forward_ad, fullgraph=True)(t, tangent)):
        # each angle's rate is rounded, and so is its sine
        assert (got - truth).abs().max() <= 2 * FLOAT32 * rate.abs().max()
    slope = torch.func.grad(lambda t: torch.func.jvp(lambda t: embedding(t, f), (t,), (torch.ones(4),))[1].sum())(t)
    expected = -(f.double() ** 2 * (angle.sin() + angle.cos())).sum(1)
    assert (slope - expected).abs().max() <= 4 * FLOAT32 * (f.double() ** 2).sum()


def test_compiles_as_one_graph():
    t, f = inputs(4, 16)
    t.requires_grad_()

    def loss(t):
        return (embedding(t, f) * torch.arange(32)).sum()

    eager, compiled = loss(t), torch.compile(loss, fullgraph=True)(t)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, t), torch.autograd.grad(eager, t))


@pytest.mark.parametrize("of_t, dtype", list(itertools.product(DTYPES, DTYPES)))
def test_opcheck(of_t, dtype):
    t, f = inputs(3, 5)
    t = t.to(of_t).requires_grad_()
    # opcheck compares gradients of eager and traced code at 1e-5: scaled times keep their size moderate
    torch.library.opcheck(torch.ops.fastdiff.embedding.default, (t, f, 0.01, False, dtype))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t": torch.zeros(2, 2)}, r"t: expected one dimension, got shape \(2, 2\)"),
        ({"t": torch.zeros(2, dtype=torch.complex64)}, "t: expected real numbers"),
        ({"freqs": torch.zeros(())}, "freqs: expected one dimension"),
        ({"freqs": torch.zeros(2, dtype=torch.int64)}, "freqs: expected a floating-point"),
        ({"freqs": torch.zeros(2, device="meta")}, "freqs: is on meta, t on cpu; move it"),
        ({"dtype": torch.int32}, "dtype: torch.int32 is not a floating-point"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        embedding(**({"t": torch.zeros(2), "freqs": torch.zeros(3)} | change))


@pytest.mark.parametrize("wrong", [{"count": -1}, {"max_period": 0.0}, {"freq_shift": 1.5}])
def test_bad_frequencies(wrong):
    with pytest.raises(ValueError, match="frequencies: "):
        frequencies(**({"count": 4} | wrong))


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 70)),
    step=st.integers(1, 3),
    types=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    scale=st.floats(-10, 10),
    sin_first=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_stride_and_type(shape, step, types, scale, sin_first):
    batch, count = shape
    t, f = (
        torch.linspace(-500, 500, batch * step)[::step].to(types[0]),
        torch.linspace(-1, 1, count * step)[::step].to(types[1]),
    )
    got = torch.ops.fastdiff.embedding(t, f, scale, sin_first, types[2])
    truth = module.reference(t, f, scale, sin_first, torch.float64)
    assert got.shape == (len(t), 2 * len(f)) and got.dtype == types[2]
    assert not got.numel() or (got - truth).abs().max() <= FLOAT32 + torch.finfo(types[2]).eps


@pytest.mark.parametrize("t, freqs", [((2, 2), (3,)), ((2,), ()), ((), (3,))])
def test_the_dispatcher_refuses_bad_shapes(t, freqs):
    with pytest.raises(RuntimeError, match=r"expected \[|1D"):
        torch.ops.fastdiff.embedding(torch.zeros(t), torch.zeros(freqs), 1.0, True, torch.float32)

"""Attention by the library's products and a back end: float64's values to rounding, in every layout and type, no copies."""

import sys

import pytest
import torch
from test_group_norm_attention import DTYPES, inputs
from test_group_norm_attention import SHAPES as IMAGES
from torch.nn import functional

from fastdiff.compile import attend
from fastdiff.compile.attend import LibraryAttention
from fastdiff.compile.steps import Attention, NormWeights

op = sys.modules["fastdiff.ops.group_norm_attention"]
SHAPES = [*(shape for shape in IMAGES if len(shape[-1]) == 2), (0, 8, 8, 2, 4, (3, 3))]  # and no image


@pytest.fixture(params=["math", "torch"])
def backend(request, monkeypatch):
    """Scores in memory, and what PyTorch takes by itself on a CPU."""
    ours = lambda q, k, v, scale: functional.scaled_dot_product_attention(q, k, v, scale=scale)  # noqa: E731
    monkeypatch.setitem(attend.BACKENDS, "torch", ours)
    return request.param


def case(n, c, e, heads, groups, space, dtype=torch.float32, stats=None, out_scale=0.7):
    """x, and the step that makes value 1 of value 0 and perhaps the statistics in value 2."""
    x, weight, bias, _, eps, *projections, _, _, _, _ = inputs(n, c, e, heads, groups, space, dtype)
    qkv_weight, qkv_bias, out_weight, out_bias = (t.to(dtype) for t in projections)
    norm = NormWeights(weight, bias, groups, eps, False, stats)
    return x, Attention(1, "attention", 0, norm, (qkv_weight, qkv_bias), (out_weight, out_bias), heads, out_scale)


def by(step, backend):
    step.library = LibraryAttention(backend, step.qkv, step.project, step.heads, step.out_scale)
    return step


def truth_of(x, step):
    n, weights = step.norm, [t.double() for t in (*step.qkv, *step.project)]
    scale = (step.project[0].shape[1] // step.heads) ** -0.5
    given = (n.groups, n.eps, *weights, step.heads, scale, step.out_scale, None)
    return op.reference(x.double(), n.weight.double(), n.bias.double(), *given)


def plain(x, step):
    """As PyTorch's modules compute it, every intermediate in the type of x."""
    n, e = len(x), step.project[0].shape[1]
    norm, size = step.norm, x.shape[2] * x.shape[3]
    h = functional.group_norm(x, norm.groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    q, k, v = (
        functional.conv2d(h, step.qkv[0][..., None, None], step.qkv[1])
        .reshape(n, 3, step.heads, e // step.heads, size)
        .mT.unbind(1)
    )
    a = functional.scaled_dot_product_attention(q, k, v).mT.reshape(n, e, *x.shape[2:])
    return (x + functional.conv2d(a, step.project[0][..., None, None], step.project[1])) * step.out_scale


def allowed(x, step, truth):
    """Twice the error of plain PyTorch at this type, and a unit in the last place of the largest value."""
    working = torch.finfo(torch.promote_types(x.dtype, torch.float32))  # of sums
    floor = truth.abs().max() * (torch.finfo(x.dtype).eps + 4 * working.eps)
    return 2 * (plain(x, step).double() - truth).abs().max() + floor


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(backend, dtype, channels_last):
    for shape in SHAPES:
        for out_scale in (1.0, 0.7):
            x, step = case(*shape, dtype, out_scale=out_scale)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            v = [x, None]
            by(step, backend).run(v, [])
            truth = truth_of(x, step)[0]
            assert v[1].dtype == dtype and v[1].shape == x.shape and v[1].stride() == x.stride()
            if not x.numel():
                continue
            assert (v[1].double() - truth).abs().max() <= allowed(x, step, truth), shape


def test_given_statistics(backend):
    """Those of the step before are taken, not computed again: others give another result."""
    x, step = case(2, 64, 64, 4, 32, (8, 8), stats=2)
    truth, stats = truth_of(x, step)
    v = [x, None, stats.float()]
    by(step, backend).run(v, [])
    assert (v[1].double() - truth).abs().max() <= allowed(x, step, truth)
    v[2] = stats.float() + 1
    step.run(v, [])
    assert (v[1].double() - truth).abs().max() > 0.1


def test_nothing_is_copied(monkeypatch):
    """q, k and v are views of one product, and so is what a back end returns in the order of pixels, as CUDA's do."""
    seen = []

    def in_order(q, k, v, scale):
        a = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
        seen.extend((q, k, v, a))
        return a

    monkeypatch.setitem(attend.BACKENDS, "in order", in_order)
    x, step = case(2, 64, 64, 4, 32, (8, 8))
    x = x.contiguous(memory_format=torch.channels_last)
    read = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda y, a, b, **more: (seen.append(a), read(y, a, b, **more))[1])
    by(step, "in order").run([x, None], [])
    q, k, v, a, rows = (t.untyped_storage().data_ptr() for t in seen)
    assert q == k == v and a == rows
    assert seen[0].shape == (2, 4, 64, 16) and seen[0].stride() == (64 * 192, 16, 192, 1)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
def test_this_pytorch_takes_the_call(backend):
    """What each back end of a GPU is asked is what its schema has, and gives a tensor like q."""
    q = torch.empty(2, 4, 64, 16, dtype=torch.bfloat16, device="meta")
    assert attend.BACKENDS[backend](q, q, q, 0.25).shape == q.shape


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("says", [False, True])
def test_pytorch_is_asked(monkeypatch, backend, says):
    """For the very q, k and v, without a word of why not."""
    asked = []
    monkeypatch.setitem(attend.CHECKS, backend, lambda params, debug: (asked.append((params, debug)), says)[1])
    x, step = case(2, 64, 32, 4, 32, (8, 8))
    assert by(step, backend).library.serves(x) is says
    ((params, debug),) = asked
    assert debug is False and params.attn_mask is None and params.is_causal is False
    assert params.query.shape == (2, 4, 64, 8) and params.key.stride() == params.query.stride() == (64 * 96, 8, 96, 1)


def test_math_can_be_switched_off(monkeypatch):
    x, step = case(2, 64, 64, 4, 32, (8, 8))
    assert by(step, "math").library.serves(x) is True
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
    assert by(step, "math").library.serves(x) is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, whose back ends these are")
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(backend, dtype):
    """Every back end that says it serves a shape."""
    for n, c, heads, size in ((2, 128, 1, 16), (2, 256, 1, 16), (1, 384, 6, 32), (2, 768, 12, 8)):
        x, step = case(n, c, c, heads, 32, (size, size), dtype)
        truth, theirs = truth_of(x, step)[0], plain(x, step)
        x = x.cuda().contiguous(memory_format=torch.channels_last)
        step.qkv, step.project = (tuple(t.cuda() for t in pair) for pair in (step.qkv, step.project))
        step.norm.weight, step.norm.bias = step.norm.weight.cuda(), step.norm.bias.cuda()
        if by(step, backend).library.serves(x):
            v = [x, None]
            step.run(v, [])
            floor = truth.abs().max() * (torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6)
            most = 2 * (theirs.double() - truth).abs().max() + floor
            assert (v[1].cpu().double() - truth).abs().max() <= most, (n, c, heads, size)
            assert v[1].stride() == x.stride()

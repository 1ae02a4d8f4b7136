"""conv3x3 by "fp8": what E4M3 is, what is packed, the reference that kernels are compared with, who serves it."""

import sys

import pytest
import torch
from test_conv3x3 import make
from torch.nn import functional

from fastdiff.ops import Norm, _conv3x3_weights, _fp8, _register, conv3x3, conv3x3_algorithms, conv3x3_pack, group_norm_silu

module = sys.modules["fastdiff.ops.conv3x3"]
# Every finite E4M3 number >= 0, by its definition: 2^-6 ... 2^8 with 3 bits behind the point, below them steps of 2^-9.
POSITIVE = torch.tensor(
    [k * 2.0**-9 for k in range(8)] + [(8 + k) * 2.0 ** (e - 3) for e in range(-6, 9) for k in range(8)][:-1]
)


def nearest(v):
    """v [n] rounded by looking for the nearest number, the even one of two; 448 beyond."""
    distance = (v.abs().clamp(max=1e3)[:, None].double() - POSITIVE.double()).abs()
    least = distance.min(1, keepdim=True).values
    even = torch.arange(len(POSITIVE)) % 2 == 0
    index = torch.where(distance == least, even.double() + 1, 0).argmax(1)
    return POSITIVE[index] * v.sign()


def test_e4m3_by_its_definition():
    assert len(POSITIVE) == 127 and POSITIVE[-1] == _fp8.LARGEST
    middles = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    v = torch.cat((POSITIVE, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), 100 * torch.randn(500)))
    v = torch.cat((v, -v, torch.tensor([463.0, 465.0, 1e9, float("inf"), -1e9])))
    assert torch.equal(_fp8.e4m3(v).float(), nearest(v))
    assert _fp8.e4m3(torch.tensor([float("nan")])).float().isnan().all()


@pytest.mark.parametrize("outputs, inputs", [(5, 32), (3, 7), (1, 1), (64, 100)])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights(outputs, inputs, transposed):
    """A row's weights are the nearest E4M3 numbers of weight / d, with d from the largest, which becomes 448."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * torch.rand(outputs, 1, 1, 1, generator=generator)
    weight[0] = 0 if outputs > 1 else weight[0]
    given = weight.flip(2, 3).transpose(0, 1).contiguous() if transposed else weight
    packed = conv3x3_pack(given, "fp8", transposed)
    assert packed.dtype == torch.float8_e4m3fn and packed.is_contiguous()
    assert tuple(packed.shape) == (outputs, 9 * -(-inputs // 16) * 16 + 16)
    assert conv3x3_pack(given.to("meta"), "fp8", transposed).shape == packed.shape
    scale = _fp8.tails(packed)[:, 0]
    largest = weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(scale, torch.where(largest > 0, largest / 448, 1.0))
    q = packed[:, :-16].float().view(outputs, 3, 3, -1)
    assert (q[..., inputs:] == 0).all(), "padding must not meet anything"
    wanted = nearest((weight.double() / scale[:, None, None, None].double()).float().flatten()).view(weight.shape)
    assert torch.equal(q[..., :inputs].permute(0, 3, 1, 2), wanted)
    assert (q.abs().amax((1, 2, 3))[largest > 0] == 448).all()


@pytest.mark.parametrize(
    "gamma, beta, factor",
    [(1.0, 0.0, 8.0), (0.5, 0.5, 8.0), (1.01, 0.0, 4.0), (-3.0, 1.0, 2.0), (0.001, 0.0, 4096.0), (0.0, 0.0, 8.0),
     (1e30, 0.0, 2.0**-57), (float("inf"), 0.0, 8.0), (float("nan"), 0.0, 8.0)],
)  # fmt: skip
def test_the_scale_of_h(gamma, beta, factor):
    """A power of two that brings |gamma| + |beta| of the largest channel to 4 ... 8."""
    norm = Norm(torch.tensor([gamma, gamma / 3]), torch.tensor([beta, 0.0]), 1)
    packed = conv3x3_pack(torch.randn(4, 2, 3, 3), "fp8", norm=norm)
    assert (_fp8.tails(packed)[:, 1] == factor).all()


def arguments(shape, dtype=torch.bfloat16, everything=True):
    """Those of the op, x's channels last."""
    x, weight, options = make(shape, dtype, True, None if everything else {"norm"})
    n = options["norm"] if everything else Norm(options["norm"].weight, options["norm"].bias, options["norm"].groups)
    packed = conv3x3_pack(weight, "fp8", norm=n)
    rest = options.get("residual"), options.get("out_scale", 1.0), options.get("stats_groups", 0), packed, "fp8"
    return (x, weight, options.get("bias"), *n, *rest)


def test_the_reference_is_the_formula():
    """Looked up number by number, in float64; x's type is where h is rounded least: not before the eight bits."""
    x, weight, bias, *norm, residual, out_scale, groups, packed, _ = args = arguments((2, 16, 24, 8, 8))
    y, stats, _ = module.reference(*args)
    h = group_norm_silu(x.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in norm))
    scale, factor = _fp8.tails(packed).double().unbind(1)
    p = nearest((h * factor[0]).float().flatten()).view(h.shape).double() / factor[0]
    w = nearest((weight.double() / scale[:, None, None, None]).float().flatten()).view(weight.shape).double()
    z = functional.conv2d(p, w * scale[:, None, None, None], padding=1) + bias.double()[..., None, None]
    truth = (z + residual.double()) * out_scale
    # half a unit of bfloat16; a few h may lie within float32's rounding of a middle, and go the other way
    wrong = (y.double() - truth).abs() > 2**-8 * truth.abs() + 1e-5
    assert wrong.double().mean() < 0.01
    assert (y.double() - truth).abs().max() < 0.02 * truth.abs().max()
    torch.testing.assert_close(stats, module.statistics(y, None, groups))


def test_the_error_of_a_layer():
    """E4M3's relative error is uniform within a binade, 2^-3 / sqrt(12) / 1.44 = 0.025 of each operand, 0.036 of a sum."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 128, 16, 16), torch.randn(64, 128, 3, 3) / 34
    norm = Norm(torch.ones(128), torch.zeros(128), 32)
    packed = conv3x3_pack(weight, "fp8", norm=norm)
    y = module.reference(x, weight, None, *norm, None, 1.0, 0, packed, "fp8")[0]
    truth = conv3x3(x.double(), weight, norm=Norm(*(t.double() if isinstance(t, torch.Tensor) else t for t in norm)))[0]
    error = ((y - truth).norm() / truth.norm()).item()
    assert 0.03 < error < 0.042, error


@pytest.mark.parametrize("size", [1e-3, 1.0, 200.0])
def test_the_error_does_not_depend_on_gamma(size):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 64, 8, 8), torch.randn(32, 64, 3, 3) / 24
    norm = Norm(size * (1 + torch.rand(64)), size * torch.randn(64) / 4, 8, silu=False)
    wide = Norm(*(t.double() if isinstance(t, torch.Tensor) else t for t in norm))
    y = module.reference(x, weight, None, *norm, None, 1.0, 0, conv3x3_pack(weight, "fp8", norm=norm), "fp8")[0]
    truth = conv3x3(x.double(), weight, norm=wide)[0]
    assert (y - truth).norm() / truth.norm() < 0.045


def test_who_serves_it(monkeypatch):
    """NVIDIA GPUs of compute capability 8.9 and later, x in 16 bits: not sm_80, not CPUs, which say so."""
    assert "fp8" not in conv3x3_algorithms(torch.bfloat16) and conv3x3_algorithms(torch.bfloat16, "meta") == ("direct",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, served in (
        ((8, 0), False),
        ((8, 6), False),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), True),
        ((12, 0), True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        found = conv3x3_algorithms(torch.bfloat16, "cuda")
        assert found == (("direct", "fp8") if served and _register.triton_error is None else ("direct",))
        assert conv3x3_algorithms(torch.float32, "cuda") == ("direct",)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert conv3x3_algorithms(torch.bfloat16, "cuda") == ("direct",)


def test_refusals(monkeypatch):
    x, weight, _, *norm, _, _, _, packed, _ = arguments((2, 16, 24, 8, 8))
    with pytest.raises(ValueError, match=r"algorithm: 'fp8' is not served for torch.bfloat16 on cpu; use direct or"):
        conv3x3(x, weight, norm=Norm(*norm), packed=packed, algorithm="fp8")
    monkeypatch.setattr(_conv3x3_weights, "conv3x3_algorithms", lambda dtype, device: ("direct", "fp8"))
    with pytest.raises(ValueError, match="norm: 'fp8' rounds what a norm gives"):
        conv3x3(x, weight, packed=packed, algorithm="fp8")
    with pytest.raises(ValueError, match=r"packed: .* is not what conv3x3_pack.*fp8.* pack again"):
        conv3x3(x, weight, norm=Norm(*norm), packed=packed[:-1], algorithm="fp8")
    with pytest.raises(ValueError, match="algorithm: 'fp8' needs a norm"):
        module.reference(x, weight, None, None, None, 1, 1e-5, *[None] * 4, True, None, 1.0, 0, packed, "fp8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_and_schema(dtype):
    """What tracing sees has the reference's shapes, strides and types, on a device that has no kernel."""
    args = arguments((2, 16, 24, 5, 3), dtype)
    with torch.device("meta"):
        got = torch.ops.fastdiff.conv3x3(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for one, two in zip(got, module.reference(*args), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype and one.stride() == two.stride()
    torch.library.opcheck(torch.ops.fastdiff.conv3x3_pack.default, (args[1], "fp8", False))


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (2, 4, 2, 0, 3)])
def test_empty(shape):
    y, stats, _ = module.reference(*arguments(shape)[:14], 2, None, "fp8")
    assert y.shape == (shape[0], 2, *shape[3:]) and stats.shape == (shape[0], 2, 2)

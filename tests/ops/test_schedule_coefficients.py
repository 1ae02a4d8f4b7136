"""schedule_coefficients: the schedules' and predictions' own float64 numbers, on the device, and their slopes."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import Denoiser, Prediction
from fastdiff.denoiser import KINDS, DeviceCoefficients
from fastdiff.ops import schedule_coefficients
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, Schedule, SubVP, TrigFlow

module = sys.modules["fastdiff.ops.schedule_coefficients"]
Law, Target, Column = module.Law, module.Target, module.Column
SCHEDULES = [EDM(), VE(), VP(), VP(beta_0=0.5), SubVP(), DDPM(), DDPM(T=7), DDPM(law="cosine"), Flow(), TrigFlow()]
PAIRS = [(s, k) for s in SCHEDULES for k in KINDS if k != "flow" or s.name == "flow"]
EPS = torch.finfo(torch.float64).eps


def times(schedule, n=40):
    """From one end to the other, both included, denser towards t_min; whole and broken indices for DDPM."""
    low, high = schedule.t_min, schedule.t_max
    t = np.concatenate((np.linspace(low, high, n), np.geomspace(max(low, 1e-3), high, n), np.linspace(low, high, 7).round()))
    return np.clip(t, low, high)


def expected(schedule, prediction, t):
    """[..., 7] from the host's classes."""
    c = prediction.coefficients(schedule, t)
    return np.stack((schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t), c.c_skip, c.c_out, c.c_in, c.c_noise), -1)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("schedule", "kind"), PAIRS, ids=lambda v: getattr(v, "name", v))
def test_values_are_the_hosts(schedule, kind, raw):
    t, prediction = times(schedule), Prediction(kind, sigma_data=0.4, time_scale=999.0, raw=raw)
    want = torch.from_numpy(expected(schedule, prediction, t))
    got = DeviceCoefficients(schedule, prediction)(torch.from_numpy(t))
    assert got.dtype == torch.float64
    # A dozen roundings; c_out of consistency is r - r_min, which cancels, and log SNR and c_noise pass through 0.
    torch.testing.assert_close(got, want, rtol=64 * EPS, atol=64 * EPS)
    rounded = DeviceCoefficients(schedule, prediction)(torch.from_numpy(t), torch.float32)
    torch.testing.assert_close(rounded, want.float(), rtol=torch.finfo(torch.float32).eps, atol=64 * EPS)


def every_case():
    for law, target, raw, slopes in itertools.product(Law, Target, (False, True), (False, True)):
        t = {
            Law.TABLE: torch.tensor([0, 0.5, 10.25, 98.5, 99, -3, 1005]).double(),
            Law.LOG_SNR: torch.linspace(-20, 20, 9).double(),
        }.get(law, torch.linspace(1e-3, 0.999, 9).double())
        table = torch.from_numpy(DDPM(T=100).log_alpha2(np.arange(100))) if law == Law.TABLE else None
        yield t, table, int(law), int(target), 0.5, 20.0, 0.4, 0.002, 999.0, raw, slopes


def test_kernel_and_reference_agree():
    for case in every_case():
        op = torch.ops.fastdiff.schedule_coefficients
        torch.testing.assert_close(op(*case, torch.float64), module.reference(*case, torch.float64), rtol=1e-12, atol=1e-13)


def test_slopes():
    """Forward and reverse derivatives of every column of every law and target, against differences in float64."""
    for t, *rest, raw, slopes in every_case():
        if not slopes and not raw:
            # off the knots of the table, where the slope jumps
            t = t[1:4] + 0.125 if rest[1] == Law.TABLE else t[2:7]

            def call(t, rest=rest):
                return torch.ops.fastdiff.schedule_coefficients(t, *rest, False, False, torch.float64)

            assert torch.autograd.gradcheck(call, t.clone().requires_grad_(), check_forward_ad=True, atol=1e-4), rest
    t = torch.tensor([-1.0, 2000.0], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(DeviceCoefficients(DDPM(), Prediction())(t)[:, Column.ALPHA].sum(), t)[0]
    assert slope.tolist() == [0, 0], "the table is constant beyond its ends"


def test_an_unused_infinite_slope_does_no_harm():
    """At sigma = 0 log SNR is infinite and so is its slope; c_skip's is not."""
    t = torch.zeros(2, requires_grad=True)
    c = schedule_coefficients(t, Law.VE, Target.EDM)
    assert c[0, Column.LOG_SNR] == torch.inf
    assert torch.autograd.grad((2 * c[:, Column.OUT]).sum(), t)[0].tolist() == [2.0, 2.0]  # d c_out / d sigma = 1


def test_a_learned_schedule_trains():
    """VDM: gamma(t) = -log SNR is a network. The gradient of a loss in alpha and sigma reaches its weights exactly."""
    torch.manual_seed(0)
    gamma = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Softplus(), torch.nn.Linear(4, 1)).double()
    t, w = torch.rand(8, 1).double(), torch.randn(8, 2).double()

    def loss(of):
        return (w * of(-gamma(t)[:, 0])).sum()

    def by_op(log_snr):
        return schedule_coefficients(log_snr, Law.LOG_SNR, Target.V)[:, [Column.ALPHA, Column.OUT]]

    def by_hand(log_snr):
        return torch.stack((log_snr.sigmoid().sqrt(), -(-log_snr).sigmoid().sqrt()), -1)

    got, want = (torch.autograd.grad(loss(of), list(gamma.parameters())) for of in (by_op, by_hand))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    first = loss(by_op).item()
    optimiser = torch.optim.SGD(gamma.parameters(), lr=0.05)
    for _ in range(20):
        optimiser.zero_grad()
        loss(by_op).backward()
        optimiser.step()
    assert loss(by_op).item() < first - 0.1


def test_log_snr_is_variance_preserving_to_the_ends():
    log_snr = torch.tensor([-60.0, -20.0, 0.0, 20.0, 60.0], dtype=torch.float64)
    c = schedule_coefficients(log_snr, Law.LOG_SNR)
    torch.testing.assert_close(c[:, 0] ** 2 + c[:, 1] ** 2, torch.ones(5, dtype=torch.float64), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(2 * (c[:, 0] / c[:, 1]).log(), log_snr, rtol=4 * EPS, atol=0)
    assert torch.equal(c[:, Column.LOG_SNR], log_snr)


def test_tangents_agree_everywhere():
    schedule, prediction = VP(), Prediction("edm")
    t, tangent = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([1.0, -2.0, 0.5]).double()

    def call(t):
        return DeviceCoefficients(schedule, prediction)(t)

    def forward_ad(t, tangent):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(t, tangent)
            return torch.autograd.forward_ad.unpack_dual(call(dual)).tangent

    _, functorch = torch.func.jvp(call, (t,), (tangent,))
    difference = (call(t + 1e-6 * tangent) - call(t - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(functorch, difference, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(forward_ad(t, tangent), functorch, rtol=0, atol=0)
    torch.testing.assert_close(torch.compile(forward_ad, fullgraph=True)(t, tangent), functorch, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        torch.func.grad(lambda t: call(t)[:, 1].sum())(t), torch.func.jvp(call, (t,), (0 * t + 1,))[1][:, 1]
    )


def test_second_derivatives_are_refused():
    t = torch.tensor([0.5], requires_grad=True)
    slope = torch.autograd.grad(schedule_coefficients(t, Law.VP, p0=0.1, p1=20.0).sum(), t, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(slope, t)


def test_denoiser_is_differentiable_in_t():
    """dD/dt of a linear network through every coefficient, against the host's numbers at t +- h."""
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    net = Denoiser(lambda x, c: x * (1 + c.reshape(-1, 1, 1, 1)), TrigFlow(), Prediction("edm"))
    t = torch.tensor([0.4, 1.1], dtype=torch.float64)
    d, slope = torch.func.jvp(lambda t: net(x, t), (t,), (torch.ones_like(t),))

    def by_host(t):
        c = net.coefficients(t.numpy())
        skip, out, inner, noise = (torch.from_numpy(v).reshape(-1, 1, 1, 1) for v in (c.c_skip, c.c_out, c.c_in, c.c_noise))
        return skip * x + out * inner * x * (1 + noise)

    # the coefficients are float32
    torch.testing.assert_close(d, by_host(t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, (by_host(t + 1e-5) - by_host(t - 1e-5)) / 2e-5, rtol=1e-5, atol=1e-6)


def test_shapes_types_and_order(isa):
    t = torch.rand(3, 4, 2)
    whole = schedule_coefficients(t, Law.FLOW, Target.V)
    assert whole.shape == (3, 4, 2, 7) and whole.dtype == torch.float32
    assert torch.equal(schedule_coefficients(t.transpose(0, 2), Law.FLOW, Target.V), whole.transpose(0, 2))
    assert torch.equal(schedule_coefficients(t[1, 2, 0], Law.FLOW, Target.V), whole[1, 2, 0]), "no dimension at all"
    assert schedule_coefficients(torch.zeros(0), Law.FLOW).shape == (0, 7)
    index = torch.tensor([0, 998, 999])
    table = torch.from_numpy(DDPM().log_alpha2(np.arange(1000)))
    by_index = schedule_coefficients(index, Law.TABLE, table=table)
    assert by_index.dtype == torch.float64
    np.testing.assert_allclose(by_index[:, 0], DDPM().alpha([0, 998, 999]), rtol=1e-14)
    for dtype in (torch.bfloat16, torch.float16):
        low = t.to(dtype)
        assert torch.equal(schedule_coefficients(low, Law.VE), schedule_coefficients(low.float(), Law.VE))
    assert schedule_coefficients(torch.tensor([torch.nan]), Law.TABLE, table=table)[0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", list(Law), ids=lambda law: law.name)
def test_opcheck(law, dtype):
    t = torch.tensor([0.25, 0.5, 0.75], dtype=dtype, requires_grad=True)
    table = -torch.arange(1.0, 4.0, dtype=torch.float64) if law == Law.TABLE else None
    args = (t, table, int(law), int(Target.EDM), 0.5, 2.0, 0.5, 0.002, 1.0, False, False, torch.float32)
    torch.library.opcheck(torch.ops.fastdiff.schedule_coefficients.default, args)


def test_compiles_as_one_graph():
    net = Denoiser(lambda x, c: x * c.reshape(-1, 1, 1, 1), DDPM(), Prediction("v", time_scale=1e-3))
    x, t = torch.randn(3, 1, 2, 2), torch.tensor([1.0, 20.0, 500.0], requires_grad=True)
    eager, compiled = net(x, t).sum(), torch.compile(lambda x, t: net(x, t).sum(), fullgraph=True)(x, t)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, t), torch.autograd.grad(eager, t))


def test_denoiser_refuses_what_has_no_image():
    zero = dataclasses.replace(Flow(), t_max=1.0)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Denoiser(lambda x, c: x, zero, Prediction("eps"))(torch.zeros(1, 2), 1.0)
    assert not Denoiser(lambda x, c: x, zero, Prediction("eps"))(torch.ones(1, 2), torch.ones(1)).isfinite().all()


def test_schedules_of_others_are_refused():
    class Own(Schedule):
        pass

    with pytest.raises(ValueError, match="schedule: Own is not computed on the device; use one of EDM, VE"):
        DeviceCoefficients(Own(), Prediction())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t": torch.zeros(2, dtype=torch.complex64)}, "t: expected real numbers"),
        ({"t": torch.zeros(2, dtype=torch.bool)}, "t: expected real numbers"),
        ({"law": 7}, r"law: 7 is not known; use one of VE \(0\)"),
        ({"target": -1}, "target: -1 is not known"),
        ({"law": Law.TABLE}, "table: law TABLE takes one"),
        ({"table": torch.zeros(3).double()}, "table: law VP takes none"),
        ({"law": Law.TABLE, "table": torch.zeros(1).double()}, r"table: expected float64 \[T\]"),
        ({"law": Law.TABLE, "table": torch.zeros(3)}, r"table: expected float64 \[T\]"),
        ({"law": Law.TABLE, "table": torch.zeros(3, device="meta").double()}, "table: is on meta"),
        ({"law": Law.TABLE, "table": torch.zeros(3).double().requires_grad_()}, "table: has no gradient"),
        ({"target": Target.FLOW}, "target: FLOW is n - x0"),
        ({"dtype": torch.bfloat16}, "dtype: torch.bfloat16 would lose"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        schedule_coefficients(**({"t": torch.zeros(2), "law": Law.VP} | change))


@pytest.mark.parametrize("wrong", [{2: 9}, {3: 9}, {3: -1}, {1: None}, {11: torch.float16}], ids=str)
def test_the_dispatcher_refuses_bad_codes(wrong):
    args = [torch.zeros(2), torch.zeros(3).double(), int(Law.TABLE), 0, 0.0, 0.0, 0.5, 0.0, 1.0, False, False, torch.float32]
    for i, value in wrong.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=r"law: |target: |table: |dtype: "):
        torch.ops.fastdiff.schedule_coefficients(*args)


@given(
    t=st.lists(st.floats(-10, 2000), max_size=8),
    law=st.sampled_from(Law),
    target=st.sampled_from(Target),
    length=st.integers(2, 5),
    numbers=st.tuples(*[st.floats(0.001, 30)] * 5),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=60, deadline=None)
def test_any_numbers(t, law, target, length, numbers, flags):
    """Finite, infinite or not a number at the same places as the reference, and the same where finite."""
    table = -torch.arange(length).double() if law == Law.TABLE else None
    args = (torch.tensor(t, dtype=torch.float64), table, int(law), int(target), *numbers, *flags, torch.float64)
    got, want = torch.ops.fastdiff.schedule_coefficients(*args), module.reference(*args)
    torch.testing.assert_close(got[..., :3], want[..., :3], rtol=1e-9, atol=1e-12, equal_nan=True)
    both = got.isfinite() & want.isfinite()
    assert got.shape == (len(t), 7) and torch.allclose(got[both], want[both], rtol=1e-6, atol=1e-9)

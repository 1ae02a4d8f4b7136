"""Predictions: whatever the network stands for, a perfect one gives D = x0."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastdiff import Denoiser, Prediction, ops
from fastdiff.denoiser import KINDS, Column, DeviceCoefficients
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, SubVP, TrigFlow

SCHEDULES = [EDM(), VE(), VP(), SubVP(), DDPM(), DDPM(law="cosine"), Flow(), TrigFlow()]


def interior(schedule):
    return np.linspace(schedule.t_min, schedule.t_max, 9)[1:]


def pairs():
    return [(s, k) for s in SCHEDULES for k in KINDS if k != "flow" or s.name == "flow"]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("schedule", "kind"), pairs(), ids=lambda v: getattr(v, "name", v))
def test_perfect_network_gives_x0(schedule, kind, raw):
    """F* = b_x0 x0 + b_n n makes D(alpha x0 + sigma n, t) = x0 at every t."""
    rng = np.random.default_rng(0)
    x0, n = rng.uniform(-1, 1, 100), rng.standard_normal(100)
    p = Prediction(kind, raw=raw)
    for t in interior(schedule):
        c, (b_x0, b_n) = p.coefficients(schedule, t), p.target(schedule, t)
        x = schedule.alpha(t) * x0 + schedule.sigma(t) * n
        d = c.c_skip * x + c.c_out * (b_x0 * x0 + b_n * n)
        # x / alpha is up to 2e4 on the cosine schedule, where that many digits cancel
        assert np.abs(d - x0).max() <= 1e-14 * max(1.0, np.abs(x / schedule.alpha(t)).max())
        if raw:
            assert c.c_in == 1 and c.c_noise == t


@pytest.mark.parametrize(
    ("kind", "schedule", "target"),
    [
        ("eps", VP(), lambda x0, n, a, s: n),
        ("eps", EDM(), lambda x0, n, a, s: n),
        ("x0", VP(), lambda x0, n, a, s: x0),
        ("v", VP(), lambda x0, n, a, s: a * n - s * x0),
        ("v", SubVP(), lambda x0, n, a, s: a * n - s * x0),
        ("score", VE(), lambda x0, n, a, s: -n / s),
        ("score", SubVP(), lambda x0, n, a, s: -n / s),
        ("flow", Flow(), lambda x0, n, a, s: n - x0),
        ("trigflow", TrigFlow(), lambda x0, n, a, s: a * n - s / 0.5 * x0 / 0.5),
    ],
)
def test_targets_are_what_they_are_called(kind, schedule, target):
    """(b_x0, b_n) against each kind's definition. v off the circle (sub-VP) is only defined up to a multiple of x."""
    t = interior(schedule)
    a, s = schedule.alpha(t), schedule.sigma(t)
    b_x0, b_n = Prediction(kind).target(schedule, t)
    if kind == "v":  # v + k x leaves D the same: compare what is left after removing x's direction
        k = (b_n - a) / s
        b_x0, b_n = b_x0 - k * a, b_n - k * s
    np.testing.assert_allclose(b_x0, target(1.0, 0.0, a, s) * np.ones_like(t), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(b_n, target(0.0, 1.0, a, s) * np.ones_like(t), rtol=1e-9, atol=1e-9)


def test_trigflow_formulas():
    """Lu and Song 2024: D = cos(t) x - sin(t) sigma_d F(x / sigma_d, t), and the same network read on EDM's path."""
    t = interior(TrigFlow())
    c = Prediction("trigflow").coefficients(TrigFlow(), t)
    np.testing.assert_allclose(c.c_skip, np.cos(t), rtol=1e-13)
    np.testing.assert_allclose(c.c_out, -0.5 * np.sin(t), rtol=1e-13)
    np.testing.assert_allclose(c.c_in, 2.0, rtol=1e-13)
    np.testing.assert_allclose(c.c_noise, t, rtol=1e-13)
    on_edm = Prediction("trigflow").coefficients(EDM(), 0.5 * np.tan(t))
    np.testing.assert_allclose(on_edm.c_in, c.c_in * np.cos(t), rtol=1e-12)  # x / alpha = x_edm
    np.testing.assert_allclose(on_edm.c_noise, c.c_noise, rtol=1e-12)
    times = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    columns = DeviceCoefficients(TrigFlow(), Prediction("trigflow"))(times)
    (slope,) = torch.autograd.grad(columns[:, Column.NOISE].sum(), times)
    torch.testing.assert_close(slope, torch.ones_like(slope))


def test_edm_formulas():
    """Karras 2022, table 1; the loss weight (s^2 + sd^2) / (s sd)^2 is 1 / c_out^2, and F* has unit variance."""
    s, sd = np.array([0.002, 0.5, 80.0]), 0.5
    c = Prediction("edm").coefficients(EDM(), s)
    np.testing.assert_allclose(c.c_skip, sd**2 / (s**2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(c.c_out, s * sd / np.sqrt(s**2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(c.c_in, 1 / np.sqrt(s**2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(c.c_noise, np.log(s) / 4, rtol=1e-14)
    np.testing.assert_allclose(c.c_out**-2, (s**2 + sd**2) / (s * sd) ** 2, rtol=1e-13)
    b_x0, b_n = Prediction("edm").target(EDM(), s)
    np.testing.assert_allclose((b_x0 * sd) ** 2 + b_n**2, 1.0, rtol=1e-12)


@pytest.mark.parametrize("schedule", [VP(), SubVP(), DDPM(), Flow(), TrigFlow()], ids=lambda s: s.name)
def test_edm_on_other_schedules(schedule):
    """The same network on x / alpha at noise level sigma / alpha: c_in x is the same number on every path."""
    t = interior(schedule)
    r, x0, n = schedule.ratio(t), 0.3, -1.2
    here, there = Prediction("edm").coefficients(schedule, t), Prediction("edm").coefficients(EDM(), r)
    x = schedule.alpha(t) * x0 + schedule.sigma(t) * n
    np.testing.assert_allclose(here.c_in * x, there.c_in * (x0 + r * n), rtol=1e-12)
    np.testing.assert_allclose(here.c_skip * x, there.c_skip * (x0 + r * n), rtol=1e-12)
    np.testing.assert_allclose(here.c_out, there.c_out, rtol=1e-12)
    np.testing.assert_allclose(here.c_noise, there.c_noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [EDM(), VE(), VP(), TrigFlow()], ids=lambda s: s.name)
def test_consistency_boundary(schedule):
    """D(x, t_min) = x / alpha whatever the network says; on EDM that is x, bit for bit."""
    c = Prediction("consistency").coefficients(schedule, schedule.t_min)
    assert c.c_out == 0 and c.c_skip == 1 / schedule.alpha(schedule.t_min)
    x = torch.randn(2, 3, 4, 4)
    d = Denoiser(lambda x, c: 1e3 * torch.ones_like(x), schedule, Prediction("consistency"))(x, schedule.t_min)
    expected = x / float(schedule.alpha(schedule.t_min))
    torch.testing.assert_close(d, expected, rtol=0 if schedule.name in ("edm", "ve") else 2e-7, atol=0)


def test_consistency_formulas():
    s, sd, e = np.array([0.01, 1.0, 80.0]), 0.5, 0.002  # Song 2023, appendix C
    c = Prediction("consistency").coefficients(EDM(), s)
    np.testing.assert_allclose(c.c_skip, sd**2 / ((s - e) ** 2 + sd**2), rtol=1e-14)
    np.testing.assert_allclose(c.c_out, sd * (s - e) / np.sqrt(s**2 + sd**2), rtol=1e-14)


def test_time_scale():
    assert Prediction("eps", time_scale=999.0).coefficients(VP(), 0.5).c_noise == 499.5
    assert Prediction("eps", time_scale=999.0, raw=True).coefficients(VP(), 0.5).c_noise == 0.5


def test_denoiser_call():
    """float32 out of any network dtype, a time per sample or one for all, labels passed on."""
    seen = {}

    def net(x, c_noise, *labels):
        seen.update(x=x, c_noise=c_noise, labels=labels)
        return (0.5 * x).bfloat16()

    x, t = torch.randn(3, 1, 2, 2), torch.tensor([0.01, 1.0, 40.0])
    d = Denoiser(net, EDM(), Prediction("edm"))(x, t, torch.tensor([1, 2, 3]))
    c = Prediction("edm").coefficients(EDM(), t.double().numpy())
    assert d.dtype == torch.float32 and seen["labels"][0].tolist() == [1, 2, 3]
    torch.testing.assert_close(seen["c_noise"], torch.from_numpy(c.c_noise).float())
    skip, out, inner = (torch.from_numpy(v).float().reshape(3, 1, 1, 1) for v in (c.c_skip, c.c_out, c.c_in))
    torch.testing.assert_close(d, skip * x + out * (0.5 * inner * x).bfloat16().float())
    one = Denoiser(net, EDM(), Prediction("edm"))(x, 1.0)
    torch.testing.assert_close(one[1], d[1])


def test_noise_is_shared():
    """x_t at two times from one call: the same n, the one that the seeds name."""
    x0, seeds = torch.rand(4, 1, 3, 3) * 2 - 1, ops.seed_tensor([5, 6, 7, 2**64 - 1])
    t, r = np.array([0.1, 0.2, 0.5, 0.9]), np.array([0.05, 0.1, 0.4, 0.8])
    x_t, x_r = Denoiser(lambda x, c: x, VP(), Prediction("eps")).noise(x0, seeds, t, r)
    n = ops.philox_normal(seeds, 0, (1, 3, 3), domain=ops.Domain.TRAINING)
    for x, times in ((x_t, t), (x_r, r)):
        a, s = (torch.from_numpy(f(times)).float().reshape(4, 1, 1, 1) for f in (VP().alpha, VP().sigma))
        torch.testing.assert_close(x, a * x0 + s * n, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("consistency",)])
def test_zero_terminal_snr(kind):
    """At alpha = 0 x holds no image: eps, score and F cannot give one and say so, x0, v and flow can."""
    schedule = dataclasses.replace(Flow(), t_max=1.0)
    if kind in ("x0", "v", "flow"):
        c, (b_x0, b_n) = Prediction(kind).coefficients(schedule, 1.0), Prediction(kind).target(schedule, 1.0)
        x0, n = 0.25, 1.5
        assert c.c_skip * n + c.c_out * (b_x0 * x0 + b_n * n) == pytest.approx(x0)
    else:
        with pytest.raises(ValueError, match=rf"alpha is 0 at t = 1.0 \(zero terminal SNR\).*'{kind}'.*smaller t"):
            Prediction(kind).coefficients(schedule, np.array([0.5, 1.0]))


def test_bad_kinds():
    with pytest.raises(ValueError, match="prediction: 'noise' is not known; use one of eps, x0"):
        Prediction("noise")
    with pytest.raises(ValueError, match="'flow' is n - x0 on the path of Flow, not of VP"):
        Prediction("flow").coefficients(VP(), 0.5)


@pytest.mark.parametrize("trained", [VP(), DDPM()], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_networks_of_another_path(trained, kind):
    """On sigma as on its own path: the same D for x / alpha, and the network is given the very same input."""
    rng = np.random.default_rng(0)
    x0, n = rng.uniform(-1, 1, 50), rng.standard_normal(50)
    own, other = Prediction(kind, time_scale=3.0), Prediction(kind, time_scale=3.0, trained=trained)
    for t in interior(trained):
        r, alpha = float(trained.ratio(t)), float(trained.alpha(t))
        a, b = own.coefficients(trained, t), other.coefficients(EDM(), r)
        x = alpha * x0 + trained.sigma(t) * n
        np.testing.assert_allclose(b.c_in * (x / alpha), a.c_in * x, rtol=1e-9)
        np.testing.assert_allclose(b.c_noise, a.c_noise, rtol=1e-6)
        np.testing.assert_allclose(b.c_skip * x / alpha + b.c_out * n, a.c_skip * x + a.c_out * n, rtol=1e-6, atol=1e-9)


def test_vp_of_edm():
    """Karras 2022, table 1, column VP: D = x - s F(x / sqrt(1 + s^2), 999 t(s))."""
    s = np.array([0.01, 1.0, 100.0])
    c = Prediction("eps", time_scale=999.0, trained=VP()).coefficients(EDM(), s)
    t = (np.sqrt(0.1**2 + 2 * 19.9 * np.log(1 + s**2)) - 0.1) / 19.9
    for got, expected in ((c.c_skip, 1 + 0 * s), (c.c_out, -s), (c.c_in, 1 / np.sqrt(1 + s**2)), (c.c_noise, 999 * t)):
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_iddpm_of_edm():
    """Column iDDPM: 999 less the index of the nearest u_j, u_j from the recursion of the paper."""
    u = np.zeros(1001)
    bar = np.sin(0.5 * np.pi * np.arange(1001) / 1000 / 1.008) ** 2
    for j in range(1000, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1)
    s = np.geomspace(0.001, 3e4, 200)
    index = np.abs(s[:, None] - u).argmin(1)
    c = Prediction("eps", trained=DDPM(law="cosine"), rounded=True).coefficients(EDM(), s)
    np.testing.assert_array_equal(c.c_noise, 999 - index)
    np.testing.assert_allclose(c.c_out, -s, rtol=1e-12)
    np.testing.assert_allclose(c.c_in, 1 / np.sqrt(1 + s**2), rtol=1e-12)


def test_ve_convention():
    """Column VE: D = x + s F(x, ln(s / 2))."""
    s = np.array([0.02, 1.0, 100.0])
    c = Prediction("ve", time_scale=0.5).coefficients(VE(), s)
    for got, expected in ((c.c_skip, 1 + 0 * s), (c.c_out, s), (c.c_in, 1 + 0 * s), (c.c_noise, np.log(s / 2))):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_learned_variance_is_no_part_of_D():
    """Of 2C channels the first C are F."""
    net = lambda x, t: torch.cat((x, 5 + x), 1)  # noqa: E731
    x = torch.randn(2, 3, 4, 4)
    whole = Denoiser(lambda x, t: x, DDPM(), Prediction())(x, 500.0)
    assert torch.equal(Denoiser(net, DDPM(), Prediction(learned_variance=True))(x, 500.0), whole)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trained": EDM()}, "trained: .*use VP or DDPM, and eps, x0 or v"),
        ({"trained": SubVP()}, "trained: "),
        ({"trained": VP(), "kind": "score"}, "trained: "),
        ({"trained": VP(), "rounded": True}, "rounded: only the times of a discrete schedule"),
    ],
)
def test_bad_trained(values, words):
    with pytest.raises(ValueError, match=words):
        Prediction(**values)


@pytest.mark.parametrize(
    "prediction",
    [Prediction(), Prediction("edm", 0.4), Prediction("eps", trained=DDPM(T=10), rounded=True, learned_variance=True)],
)
def test_description(prediction):
    values = prediction.describe()
    assert Prediction.from_dict(json.loads(json.dumps(values))) == prediction
    assert set(Prediction().describe()) == {"kind", "sigma_data", "time_scale", "raw"}

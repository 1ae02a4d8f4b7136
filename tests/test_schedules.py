"""Schedules against independent formulas, their own inverses, and the SDEs they belong to."""

import dataclasses
import math

import numpy as np
import pytest

from fastdiff import schedules
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, Schedule, SubVP, TrigFlow

ALL = [
    EDM(),
    VE(),
    VP(),
    VP(beta_0=0.5, beta_1=12.0),
    SubVP(),
    DDPM(),
    DDPM(T=100),
    DDPM(law="cosine"),
    DDPM(law="scaled_linear"),
    Flow(),
    TrigFlow(),
]
CONTINUOUS = [s for s in ALL if not isinstance(s, DDPM)]


def named(schedule):
    return schedule.name if schedule == type(schedule)() else str(schedule)


def grid(schedule, n=201):
    """Times over the whole range, denser towards t_min, where inverses lose digits first."""
    low, high = schedule.t_min, schedule.t_max
    return np.unique(np.concatenate((np.linspace(low, high, n), np.geomspace(max(low, 1e-3), high, n))))


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_time_of_inverts_ratio(schedule):
    t = grid(schedule)
    # Half the digits of 1 - alpha^2 at small t are gone in sigma only if it is computed without expm1: 1e-9 sees that.
    np.testing.assert_allclose(schedule.time_of(schedule.ratio(t)), t, rtol=1e-9, atol=1e-9 * schedule.t_max)


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_ratio_rises_and_snr_follows(schedule):
    t = grid(schedule)
    assert np.all(np.diff(schedule.ratio(t)) > 0) and np.all(schedule.sigma(t) > 0) and np.all(schedule.alpha(t) > 0)
    np.testing.assert_allclose(
        schedule.log_snr(t), 2 * np.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-12, atol=1e-12
    )
    assert schedule.prior_std == schedule.sigma(schedule.t_max)


def test_variance_preserving_ends():
    """abar at the end, worked out elsewhere: continuous VP 4.3186e-5, discrete DDPM 4.0358e-5."""
    assert VP().alpha(1.0) ** 2 == pytest.approx(4.3186e-5, rel=2e-5)
    assert DDPM().alpha(999) ** 2 == pytest.approx(4.0358e-5, rel=2e-5)
    for schedule in (VP(), DDPM(), DDPM(law="cosine")):
        t = grid(schedule)
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-14)


def test_formulas():
    t = np.array([0.001, 0.3, 1.0])
    log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1  # score SDE's marginal_prob
    np.testing.assert_allclose(VP().alpha(t), np.exp(log_mean), rtol=1e-14)
    np.testing.assert_allclose(VP().sigma(t), np.sqrt(1 - np.exp(2 * log_mean)), rtol=1e-11)
    np.testing.assert_allclose(SubVP().sigma(t), 1 - np.exp(2 * log_mean), rtol=1e-11)
    np.testing.assert_allclose(VE().level(t), 0.01 * 5000.0**t, rtol=1e-14)
    np.testing.assert_allclose(TrigFlow().ratio(t), 0.5 * np.tan(t), rtol=1e-14)
    assert TrigFlow().ratio(TrigFlow().t_max) == pytest.approx(80.0) and TrigFlow().ratio(TrigFlow().t_min) == pytest.approx(
        0.002
    )
    np.testing.assert_array_equal(Flow().alpha(t) + Flow().sigma(t), 1.0)
    for edm in (EDM(), VE()):
        np.testing.assert_array_equal(edm.sigma(t), t)
        np.testing.assert_array_equal(edm.alpha(t), 1.0)


def test_ddpm_is_a_running_product():
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.array([math.prod(1 - betas[: k + 1]) for k in (0, 1, 10, 500, 999)])
    np.testing.assert_allclose(DDPM().alpha([0, 1, 10, 500, 999]) ** 2, abar, rtol=1e-12)
    # between indices log alpha^2 is interpolated linearly
    assert DDPM().alpha(10.25) ** 2 == pytest.approx(DDPM().alpha(10) ** 1.5 * DDPM().alpha(11) ** 0.5, rel=1e-12)


def test_cosine_law():
    """Nichol and Dhariwal 2021, equation 17, with beta cut at 0.999: only the last step reaches it."""
    schedule, k = DDPM(law="cosine"), np.arange(999)

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = np.array([f((i + 1) / 1000) / f(0) for i in k])
    np.testing.assert_allclose(schedule.alpha(k) ** 2, expected, rtol=1e-9)
    assert schedule.betas[-1] == 0.999 and schedule.betas[-2] < 0.999


@pytest.mark.parametrize("schedule", [VP(), VP(beta_0=1.0, beta_1=5.0), SubVP()], ids=named)
def test_sde_makes_the_path(schedule):
    """d ln alpha / dt = f and d sigma^2 / dt - 2 f sigma^2 = g^2, by central differences."""
    t, h = np.linspace(0.02, 0.98, 49), 1e-5
    f, g2 = schedule.drift_diffusion(t)
    np.testing.assert_allclose((np.log(schedule.alpha(t + h)) - np.log(schedule.alpha(t - h))) / (2 * h), f, rtol=1e-7)
    slope = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
    np.testing.assert_allclose(slope - 2 * f * schedule.sigma(t) ** 2, g2, rtol=1e-6)


def test_ve_sde_makes_the_path():
    """The same in VE's own s, in which sigma is geometric."""
    schedule, s, h = VE(), np.linspace(0.02, 0.98, 49), 1e-5
    f, g2 = schedule.drift_diffusion(schedule.level(s))
    slope = (schedule.level(s + h) ** 2 - schedule.level(s - h) ** 2) / (2 * h)
    np.testing.assert_allclose(slope, g2, rtol=1e-7)
    assert not f.any()


def test_no_sde():
    with pytest.raises(ValueError, match=r"Flow has no SDE here; use VP, SubVP or VE"):
        Flow().drift_diffusion(0.5)


def test_karras():
    """Equation 5 with rho = 7; a single level is the largest."""
    got = schedules.karras(80.0, 0.002, 18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got[1] == pytest.approx(57.58598472124816, rel=1e-12)  # EDM's own grid
    assert schedules.karras(80.0, 0.002, 1).tolist() == [80.0]


def test_log_linear():
    """Even in log r between two levels; along a list, its own levels where the numbers agree."""
    np.testing.assert_allclose(schedules.log_linear([100.0, 0.01], 5), [100.0, 10.0, 1.0, 0.1, 0.01], rtol=1e-12)
    levels = [14.6, 6.47, 3.86, 2.7, 1.89, 1.4, 0.96, 0.65, 0.4, 0.15, 0.03]  # Align Your Steps
    np.testing.assert_allclose(schedules.log_linear(levels, 11), levels, rtol=1e-12)
    np.testing.assert_allclose(schedules.log_linear(levels, 21)[::2], levels, rtol=1e-12)
    assert schedules.log_linear(levels, 1).tolist() == [14.6]


def test_scaled_linear_law():
    """Latent diffusion's betas: the square roots are even."""
    betas = DDPM(1000, 0.00085, 0.012, "scaled_linear").betas
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.012**0.5 - 0.00085**0.5) / 999, rtol=1e-9)
    assert betas[0] == pytest.approx(0.00085) and betas[-1] == pytest.approx(0.012)


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_dictionary_round_trip(schedule):
    again = schedules.from_dict(schedules.to_dict(schedule))
    assert again == schedule and type(again) is type(schedule)
    assert dataclasses.asdict(again) == dataclasses.asdict(schedule)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min, sigma_max: 2.0, 1.0"),
        (lambda: DDPM(law="square"), "law: 'square' is not known; use 'linear', 'scaled_linear' or 'cosine'"),
        (lambda: DDPM(T=1), "T: 1 is too small"),
        (lambda: schedules.from_dict({"name": "nope"}), "schedule: 'nope' is not known; use one of edm, ve"),
        (lambda: EDM().check([80.0, 81.0]), r"times: 81.0 lies outside EDM's range 0.002 ... 80.0"),
        (lambda: VP().check(float("nan")), "times: nan lies outside"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_schedule_of_ones_own():
    """The base class needs alpha, sigma and time_of, no more."""

    class Half(Schedule):
        name, t_min, t_max = "half", 0.1, 1.0

        def alpha(self, t):
            return np.full_like(np.asarray(t, float), 0.5)

        def sigma(self, t):
            return np.asarray(t, float)

        def time_of(self, ratio):
            return 0.5 * np.asarray(ratio, float)

    assert Half().ratio(0.3) == 0.6 and Half().prior_std == 1.0

"""Every sampler against its textbook, written here as a plain loop, on the same noise.

The plan's rows are replayed in float64 (they must equal the textbook to rounding), and `execute`, float32 through the
fused op, is held to twice the error of the same textbook loop run in float32.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastdiff import Prediction, ops, samplers
from fastdiff.plan import execute
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, SubVP, TrigFlow

SHAPE = (3, 5, 7)  # odd sizes: 105 elements, no multiple of Philox's four


# ---- textbooks: (D, x, z) -> x0; D(x, alpha, sigma), x unit noise, z(i) the i-th step's noise


def book_ddpm(nfe, variance, clip, T=1000):
    """Ho 2020, algorithm 2 with x0 clipped, on the respaced steps of Nichol and Dhariwal 2021."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    steps = np.round(np.linspace(0, T - 1, nfe)).astype(int)

    def run(D, x, z):
        x = x * math.sqrt(1 - abar[T - 1])  # the variance-preserving prior at step T-1
        for i, (k, t) in enumerate(reversed(list(enumerate(steps)))):
            prev = abar[steps[k - 1]] if k else 1.0
            beta = 1 - abar[t] / prev
            x0 = D(x, math.sqrt(abar[t]), math.sqrt(1 - abar[t]))
            x0 = x0.clamp(-1, 1) if clip else x0
            mu = math.sqrt(prev) * beta / (1 - abar[t]) * x0 + math.sqrt(1 - beta) * (1 - prev) / (1 - abar[t]) * x
            var = beta if variance == "large" else beta * (1 - prev) / (1 - abar[t])
            x = mu + math.sqrt(var) * z(i) if k else mu
        return x

    return run


def book_ddim(nfe, eta, clip, spacing="uniform", T=1000):
    """Song, Meng, Ermon 2021, equation 12."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    grids = {"uniform": range(0, T, T // nfe), "quadratic": [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), nfe) ** 2]}
    steps = list(grids[spacing])
    assert len(steps) == nfe

    def run(D, x, z):
        x = x * math.sqrt(1 - abar[steps[-1]])
        for i, (t, s) in enumerate(zip(reversed(steps), [*reversed(steps[:-1]), None], strict=True)):
            at, a_s = abar[t], 1.0 if s is None else abar[s]
            x0 = D(x, math.sqrt(at), math.sqrt(1 - at))
            x0 = x0.clamp(-1, 1) if clip else x0
            eps = (x - math.sqrt(at) * x0) / math.sqrt(1 - at)
            std = eta * math.sqrt((1 - a_s) / (1 - at)) * math.sqrt(1 - at / a_s)
            x = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - std**2) * eps + (std * z(i) if std else 0)
        return x

    return run


def book_edm(steps, r_max, r_min, heun, alpha_of=lambda r: 1.0, churn=(0.0, 0.0, math.inf, 1.0), rho=7, clip=False):
    """Karras 2022, algorithm 2, on y = x / alpha at noise level r = sigma / alpha; x_hat's time is r_hat's."""
    i = np.arange(steps)
    r = (r_max ** (1 / rho) + i / (steps - 1) * (r_min ** (1 / rho) - r_max ** (1 / rho))) ** rho
    r = [*map(float, r), 0.0]
    S_churn, S_min, S_max, S_noise = churn

    def run(D, x, z):
        def denoise(y, level):
            a = alpha_of(level)
            d = D(a * y, a, a * level)
            return d.clamp(-1, 1) if clip else d

        y = x * r[0]
        for k in range(steps):
            gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= r[k] <= S_max else 0.0
            hat = r[k] * (1 + gamma)
            if gamma:
                y = y + math.sqrt(hat**2 - r[k] ** 2) * S_noise * z(k)
            slope = (y - denoise(y, hat)) / hat
            end = y + (r[k + 1] - hat) * slope
            if heun and r[k + 1] > 0:
                second = (end - denoise(end, r[k + 1])) / r[k + 1]
                end = y + (r[k + 1] - hat) * (slope + second) / 2
            y = end
        return y

    return run


def book_vp_em(nfe, sub, b0=0.1, b1=20.0):
    """Song 2021: x <- x + (f x - g^2 score) dt + g sqrt(-dt) z over linspace(1, 1e-3, N), the last mean returned."""

    def run(D, x, z):
        dt = -1.0 / nfe
        for i, t in enumerate(np.linspace(1, 1e-3, nfe)):
            log_a = -0.25 * t**2 * (b1 - b0) - 0.5 * t * b0
            beta, a = b0 + t * (b1 - b0), math.exp(log_a)
            s = 1 - a**2 if sub else math.sqrt(1 - a**2)
            g2 = beta * (1 - math.exp(-2 * b0 * t - (b1 - b0) * t**2)) if sub else beta
            if i == 0:
                x = x * s
            score = (a * D(x, a, s) - x) / s**2
            mean = x + (-0.5 * beta * x - g2 * score) * dt
            x = mean + math.sqrt(-g2 * dt) * z(i) if i < nfe - 1 else mean
        return x

    return run


def book_ve_em(nfe, low=0.01, high=50.0):
    """The same for VE over linspace(1, 1e-5, N)."""

    def run(D, x, z):
        x, dt = x * high, -1.0 / nfe
        for i, t in enumerate(np.linspace(1, 1e-5, nfe)):
            s = low * (high / low) ** t
            g2 = 2 * s**2 * math.log(high / low)
            mean = x - g2 * (D(x, 1.0, s) - x) / s**2 * dt
            x = mean + math.sqrt(-g2 * dt) * z(i) if i < nfe - 1 else mean
        return x

    return run


def book_consistency(times, floor, clip=False):
    """Song 2023, algorithm 1."""

    def run(D, x, z):
        x = x * times[0]
        for i, t in enumerate(times):
            d = D(x, 1.0, t)
            d = d.clamp(-1, 1) if clip else d
            x = d + math.sqrt(times[i + 1] ** 2 - floor**2) * z(i) if i < len(times) - 1 else d
        return x

    return run


def vp_alpha(r):
    return 1 / math.sqrt(1 + r * r)


def subvp_alpha(r):
    return 2 / (r + math.sqrt(r * r + 4))  # (1 - a^2) / a = r


@dataclasses.dataclass
class Case:
    plan: Callable
    book: Callable
    nfe: int


EPS, F, X0, RAW = Prediction("eps", raw=True), Prediction("edm"), Prediction("x0", raw=True), Prediction("v", raw=True)
CHURN = (40.0, 0.05, 50.0, 1.003)
CHURNED = dict(zip(("S_churn", "S_min", "S_max", "S_noise"), CHURN, strict=True))
VP_MAX, VP_MIN = (float(VP().ratio(t)) for t in (1.0, 1e-3))
SUB_MAX, SUB_MIN = (float(SubVP().ratio(t)) for t in (1.0, 1e-3))

CASES = {
    # small nfe to keep coefficients far from their limits, 1000 for DDPM's own algorithm
    "ddpm-large-20": Case(lambda: samplers.ddpm(DDPM(), EPS, 20), book_ddpm(20, "large", True), 20),
    "ddpm-small-20": Case(
        lambda: samplers.ddpm(DDPM(), RAW, 20, variance="small", clip=False), book_ddpm(20, "small", False), 20
    ),
    "ddpm-large-1000": Case(lambda: samplers.ddpm(DDPM(), EPS, 1000), book_ddpm(1000, "large", True), 1000),
    "ddim-0": Case(lambda: samplers.ddim(DDPM(), EPS, 50), book_ddim(50, 0.0, False), 50),
    "ddim-1-clipped": Case(lambda: samplers.ddim(DDPM(), EPS, 20, eta=1.0, clip=True), book_ddim(20, 1.0, True), 20),
    "ddim-quadratic": Case(
        lambda: samplers.ddim(DDPM(), EPS, 10, eta=0.3, spacing="quadratic"), book_ddim(10, 0.3, False, "quadratic"), 10
    ),
    "euler-edm": Case(lambda: samplers.euler(EDM(), F, 12), book_edm(12, 80, 0.002, False), 12),
    "heun-edm-35": Case(lambda: samplers.heun(EDM(), F, 35), book_edm(18, 80, 0.002, True), 35),
    "heun-edm-clipped": Case(lambda: samplers.heun(EDM(), F, 9, clip=True), book_edm(5, 80, 0.002, True, clip=True), 9),
    "heun-edm-churned": Case(lambda: samplers.heun(EDM(), F, 31, **CHURNED), book_edm(16, 80, 0.002, True, churn=CHURN), 31),
    # S_max unbounded: the very first step is churned too, by a row that evaluates nothing
    "heun-churned-from-the-start": Case(
        lambda: samplers.heun(EDM(), F, 9, S_churn=5.0), book_edm(5, 80, 0.002, True, churn=(5.0, 0, math.inf, 1.0)), 9
    ),
    "euler-vp-churned": Case(
        lambda: samplers.euler(VP(), EPS, 10, S_churn=4.0, S_max=20.0),
        book_edm(10, VP_MAX, VP_MIN, False, vp_alpha, (4.0, 0.0, 20.0, 1.0)),
        10,
    ),
    "heun-vp": Case(lambda: samplers.heun(VP(), EPS, 19), book_edm(10, VP_MAX, VP_MIN, True, vp_alpha), 19),
    "heun-vp-churned": Case(
        lambda: samplers.heun(VP(), EPS, 19, **CHURNED),
        book_edm(10, VP_MAX, VP_MIN, True, vp_alpha, CHURN),
        19,
    ),
    "heun-subvp": Case(lambda: samplers.heun(SubVP(), X0, 19), book_edm(10, SUB_MAX, SUB_MIN, True, subvp_alpha), 19),
    "heun-flow": Case(
        lambda: samplers.heun(Flow(), X0, 11, ratio_max=80.0, ratio_min=0.01),
        book_edm(6, 80.0, 0.01, True, lambda r: 1 / (1 + r)),
        11,
    ),
    "heun-trigflow": Case(
        lambda: samplers.heun(TrigFlow(), F, 11), book_edm(6, 80, 0.002, True, lambda r: 1 / math.sqrt(1 + 4 * r * r)), 11
    ),
    "em-vp": Case(lambda: samplers.euler_maruyama(VP(), EPS, 50), book_vp_em(50, False), 50),
    "em-subvp": Case(lambda: samplers.euler_maruyama(SubVP(), EPS, 50), book_vp_em(50, True), 50),
    "em-ve": Case(lambda: samplers.euler_maruyama(VE(), EPS, 50), book_ve_em(50), 50),
    "consistency-ect": Case(
        lambda: samplers.consistency(EDM(), F, 4, times=[80.0, 5.0, 1.2, 0.4]),
        book_consistency([80.0, 5.0, 1.2, 0.4], 0.0),
        4,
    ),
    "consistency-one": Case(lambda: samplers.consistency(EDM(), F, 1), book_consistency([80.0], 0.0), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_textbook(name, make_mixture, make_oracle, replay, philox):
    case, data = CASES[name], make_mixture()
    plan = case.plan()
    seeds = ops.seed_tensor([3, 1 << 63])
    z, start = philox(seeds, SHAPE), ops.philox_normal(seeds, 0, SHAPE)
    truth = case.book(data.denoise, start.double(), lambda i: z(i).double())

    # Coefficients come from other operations than the textbook's: rounding of float64, amplified by the start's size.
    rows = replay(plan, data, start, z)
    assert (rows - truth).abs().max() <= 1e-13 * plan.prior_std + 1e-12

    oracle = make_oracle(plan, data)
    with torch.inference_mode():
        got = execute(plan, oracle, seeds, SHAPE)
    assert oracle.calls == plan.nfe == case.nfe
    # Twice plain float32, and twice again since F and the coefficients are rounded to float32 too, where the plain
    # loop has only x and D so; and eight roundings at images of size 1.
    plain = case.book(data.denoise, start, z)
    error, allowed = (got.double() - truth).abs().max().item(), 4 * (plain.double() - truth).abs().max().item()
    assert error <= allowed + 8 * torch.finfo(torch.float32).eps, (error, allowed)


def test_consistency_boundary_floor():
    """A network with D(x, t_min) = x gets noise sqrt(t^2 - t_min^2), an ECT network t."""
    amounts = [
        samplers.consistency(EDM(), Prediction(kind), 2, times=[80.0, 0.5]).rows[0].noise for kind in ("consistency", "edm")
    ]
    assert amounts[0] == {0: pytest.approx(math.sqrt(0.5**2 - 0.002**2), rel=1e-15)} and amounts[1] == {0: 0.5}

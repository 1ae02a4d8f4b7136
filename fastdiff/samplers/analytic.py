"""Fewer steps of a DDPM chain, chosen or corrected by statistics of the model: Analytic-DPM, FastDPM, Watson's schedule."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser, Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import check_nfe, given_times, times_of
from fastdiff.samplers._recipe import one_step
from fastdiff.samplers.ddpm import ddim, ddpm, most, pairs
from fastdiff.schedules import DDPM, Schedule

HIGHEST_BETA = 1 - 1e-12
LAST_PIXEL = 2.0  # the last noise is at most that of so many of 255 grey levels


def analytic_ddpm(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    gamma=None,
    eta: float = 1.0,
    spacing: str = "linspace",
    times=None,
    last_pixel: float | None = LAST_PIXEL,
    clip: bool = True,
) -> Plan:
    """DDPM (eta = 1) or DDIM (eta = 0) with the variance that is optimal for the model's error (Bao et al. 2022).

    std^2 = eta^2 beta-tilde + a_D^2 clip(sigma_t^2 / alpha_t^2 (1 - Gamma_t), 0, 1), where a_D is what the step multiplies
    D with and Gamma_t = E ||eps||^2 / d. On Gaussian data this is the exact Var(x_s | x_t).

    gamma: Gamma at every step of the chain [T], as `estimate_gamma` gives it and a model stores it in info["gamma"], or at
    the nfe times. last_pixel: bound on the last noise, pixel 2 / 255 sqrt(pi / 2); None for none.
    """
    check_nfe(nfe, "analytic-ddpm", most(schedule))
    if gamma is None:
        raise ValueError("gamma: Analytic-DPM needs Gamma of the model; estimate it once with samplers.estimate_gamma")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is out of range; use 0 (DDIM) ... 1 (DDPM)")
    t = times_of(schedule, nfe, spacing) if times is None else given_times(schedule, times, nfe)
    table = _at_times(np.asarray(gamma, dtype=np.float64), t, schedule)
    rows = []
    for i, (now, then, a_t, s_t, a_s, s_s) in enumerate(pairs(schedule, t)):
        base = eta**2 * (s_t**2 - (a_t / a_s) ** 2 * s_s**2) * s_s**2 / s_t**2
        eps = math.sqrt(max(s_s**2 - base, 0.0))
        d = a_s - eps * a_t / s_t
        variance = base + d**2 * np.clip(s_t**2 / a_t**2 * (1 - table[i]), 0, 1)
        if i == nfe - 2 and last_pixel is not None:
            variance = min(variance, (last_pixel * 2 / 255 * math.sqrt(math.pi / 2)) ** 2)
        noise = {i: math.sqrt(variance)} if i < nfe - 1 else {}
        rows.append(one_step(now, then, eps / s_t, d, noise, clip))
    return Plan("analytic-ddpm", tuple(rows), schedule, prediction, float(schedule.sigma(t[0])))


def _at_times(gamma: np.ndarray, t: np.ndarray, schedule: Schedule) -> np.ndarray:
    if gamma.shape == t.shape:
        return gamma
    if isinstance(schedule, DDPM) and gamma.shape == (schedule.T,):
        return np.interp(t, np.arange(schedule.T), gamma)
    raise ValueError(f"gamma: {gamma.shape} values; give one for each step of the chain, or for each of the {len(t)} times")


def estimate_gamma(
    denoiser: Denoiser, images: Tensor, times: Iterable[float], seeds: Tensor, labels: Tensor | None = None
) -> np.ndarray:
    """Gamma_t = E ||eps(x_t, t)||^2 / d at each of `times`, over images [B, C, H, W], each noised with its own seed."""
    values = []
    with torch.no_grad():
        for draw, t in enumerate(times):
            each = np.full(len(images), float(t))
            x = denoiser.noise(images, seeds, each, draw=draw)[0]
            alpha, sigma = float(denoiser.schedule.alpha(t)), float(denoiser.schedule.sigma(t))
            eps = (x - alpha * denoiser(x, each, labels)) / sigma
            values.append(eps.double().square().mean().item())
    return np.array(values)


def fast_ddpm(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    method: str = "var",
    spacing: str = "uniform",
    kappa: float = 0.0,
    clip: bool = False,
) -> Plan:
    """FastDPM (Kong and Ping 2021): DDIM's step with eta = kappa at other noise levels than the chain's own.

    method "step" takes nfe steps of the chain, evenly ("uniform") or evenly in sqrt(t) ("quadratic"). "var" gives the short
    chain betas of its own, even or even in their square root from beta_0 and such that it ends at the same alpha, and
    looks where the long chain has the same noise, at times between its steps.
    """
    check_nfe(nfe, "fast-ddpm", most(schedule))
    if not isinstance(schedule, DDPM):
        raise ValueError(f"schedule: FastDPM shortens a DDPM chain, not {type(schedule).__name__}; use ddim")
    if method not in ("step", "var") or spacing not in ("uniform", "quadratic"):
        raise ValueError(f"method, spacing: {method!r}, {spacing!r}; use 'step' or 'var' and 'uniform' or 'quadratic'")
    t = times_of(schedule, nfe, spacing) if method == "step" else variance_times(schedule, nfe, spacing)
    plan = ddim(schedule, prediction, nfe, eta=kappa, times=t, clip=clip)
    return Plan("fast-ddpm", plan.rows, schedule, prediction, plan.prior_std)


def variance_times(schedule: DDPM, n: int, spacing: str) -> np.ndarray:
    """Descending times at which the chain has the noise of n betas from beta_0 to the one that makes the ends agree."""
    target, first = float(schedule.log_alpha2(schedule.t_max)), float(schedule.betas[0])
    log_alpha2 = short_chain(spacing, first, n, target)
    return np.interp(-log_alpha2, -schedule.log_alpha2(np.arange(schedule.T)), np.arange(schedule.T))[::-1]


def short_chain(law: str, first: float, n: int, target: float) -> np.ndarray:
    """log abar_1 ... log abar_n, the last of them `target`, of n betas that begin with `first`.

    law "uniform": even betas; "quadratic": even in their roots; "fibonacci": each the sum of the two before it. Where n of
    the smallest betas are too much already, all of them shrink.
    """
    if n == 1:
        return np.array([target])

    def chain(beta: float, free: float) -> np.ndarray:
        """free: the last beta, the second in Fibonacci's law."""
        power = 2 if law == "quadratic" else 1
        betas = np.linspace(beta ** (1 / power), free ** (1 / power), n) ** power
        if law == "fibonacci":
            betas = np.array([beta, free])
            while len(betas) < n:
                betas = np.append(betas, min(betas[-1] + betas[-2], HIGHEST_BETA))
        return np.cumsum(np.log1p(-betas))

    shrunk = chain(first, first)[-1] < target
    low, high = (0.0, first) if shrunk else (first, HIGHEST_BETA)
    for _ in range(200):  # bisection: the chain's end falls as betas grow
        middle = (low + high) / 2
        end = chain(middle if shrunk else first, middle)[-1]
        low, high = (middle, high) if end > target else (low, middle)
    return chain(low if shrunk else first, low)


def watson(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    mse=None,
    variance: str = "small",
    clip: bool = True,
) -> Plan:
    """DDPM on the nfe steps of the chain whose variational bound is the best of all (Watson et al. 2021).

    mse: E ||x0 - D||^2 per image at every step of the chain [T]. With equal variances the bound's term of a jump from t to s
    is (snr_s - snr_t) / 2 mse_t, and `best_steps` finds the cheapest way; the last jump, to the image, is free.
    """
    check_nfe(nfe, "watson", most(schedule))
    if not isinstance(schedule, DDPM):
        raise ValueError(f"schedule: Watson's schedule picks steps of a DDPM chain, not of {type(schedule).__name__}")
    if mse is None or np.shape(mse) != (schedule.T,):
        raise ValueError(f"mse: E ||x0 - D||^2 is needed at each of the {schedule.T} steps, got {np.shape(mse)}")
    snr = np.exp(schedule.log_snr(np.arange(schedule.T)))
    cost = 0.5 * (snr[:, None] - snr[None, :]) * np.asarray(mse, dtype=np.float64)[None, :]
    times = best_steps(cost, nfe)[::-1].astype(np.float64)
    plan = ddpm(schedule, prediction, nfe, variance=variance, times=times, clip=clip)
    return Plan("watson", plan.rows, schedule, prediction, plan.prior_std)


def best_steps(cost: np.ndarray, n: int) -> np.ndarray:
    """n ascending indices from 0 to T - 1 with the least sum of cost[s, t] over neighbours s < t: dynamic programming."""
    T = len(cost)
    if not 1 <= n <= T:
        raise ValueError(f"n: {n} of {T} steps cannot be chosen; use 1 ... {T}")
    if n == 1:
        return np.array([T - 1])
    allowed = np.where(np.arange(T)[:, None] < np.arange(T)[None, :], cost, np.inf)
    best, came = np.where(np.arange(T) == 0, 0.0, np.inf), []
    for _ in range(n - 1):
        total = best[:, None] + allowed
        came.append(total.argmin(0))
        best = total.min(0)
    way = [T - 1]
    for back in reversed(came):
        way.append(int(back[way[-1]]))
    return np.array(way[::-1])

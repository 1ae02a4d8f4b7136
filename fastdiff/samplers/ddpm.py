"""DDPM's ancestral sampler and DDIM, on any schedule.

Between times t > s the forward process adds variance s_ts^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2; on DDPM's
schedule that is 1 - abar_t / abar_s. After the last time comes the image itself, alpha = 1, sigma = 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import check_nfe, given_times, respaced, times_of
from fastdiff.samplers._recipe import one_step
from fastdiff.schedules import DDPM, Schedule


def most(schedule: Schedule) -> int | None:
    """How many steps there are to choose from."""
    return schedule.T if isinstance(schedule, DDPM) else None


def pairs(schedule, t):
    """(t, s, alpha_t, sigma_t, alpha_s, sigma_s) for every step; s = t_min stands for the image at the end."""
    a, s = np.append(schedule.alpha(t), 1.0), np.append(schedule.sigma(t), 0.0)
    ends = np.append(t[1:], schedule.t_min)
    return zip(t.tolist(), ends.tolist(), a[:-1], s[:-1], a[1:], s[1:], strict=True)


def ddpm(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    variance: str = "large",  # "large": beta (DDPM's CIFAR-10 choice), "small": the posterior's beta-tilde
    spacing: str = "linspace",
    sections: Sequence[int] | None = None,
    times=None,
    t_start: float | None = None,
    denoise: bool = True,  # False: noise in the last step too, as diffusers adds it where that step begins at t > 0
    clip: bool = True,
) -> Plan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on a subset of the steps when nfe is smaller than T.

    x_s = alpha_s s_ts^2 / sigma_t^2 D + alpha_t sigma_s^2 / (alpha_s sigma_t^2) x + std z, no noise in the last step.
    variance "learned": the network returns V in as many channels again, and log std^2 lies between the logarithms of small
    (V = -1) and large (V = 1). sections: how many steps to keep in each of so many equal parts of the chain, least noise
    first (Nichol and Dhariwal 2021).
    """
    check_nfe(nfe, "ddpm", most(schedule))
    if variance not in ("large", "small", "learned"):
        raise ValueError(f"variance: {variance!r} is not known; use 'large', 'small' or 'learned'")
    if sections is not None:
        times = respaced(schedule, sections)
    t = times_of(schedule, nfe, spacing, t_start) if times is None else given_times(schedule, times, nfe)
    rows = []
    for i, (now, then, a_t, s_t, a_s, s_s) in enumerate(pairs(schedule, t)):
        added = s_t**2 - (a_t / a_s) ** 2 * s_s**2
        small = added * s_s**2 / s_t**2
        std = {"large": np.sqrt(added), "small": np.sqrt(small), "learned": 0.0}[variance]
        noise = {i: float(std)} if i < nfe - 1 or not denoise else {}
        row = one_step(now, then, (a_t / a_s) * s_s**2 / s_t**2, a_s * added / s_t**2, noise, clip)
        if variance == "learned" and noise:
            row = dataclasses.replace(row, learned=(float(np.log(max(small, 1e-20))), float(np.log(added))))
        rows.append(row)
    return Plan("ddpm", tuple(rows), schedule, prediction, float(schedule.sigma(t[0])))


def ddim(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    eta: float = 0.0,  # 0: deterministic, Euler on the probability-flow ODE; 1: DDPM with small variance
    spacing: str = "uniform",
    times=None,
    t_start: float | None = None,
    clip: bool = False,
) -> Plan:
    """DDIM (Song, Meng, Ermon 2021, equation 12): x_s = alpha_s D + sqrt(sigma_s^2 - std^2) eps + std z.

    eps = (x - alpha_t D) / sigma_t, std = eta s_ts sigma_s / sigma_t.
    """
    check_nfe(nfe, "ddim", most(schedule))
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is out of range; use 0 (deterministic) ... 1 (as noisy as DDPM)")
    t = times_of(schedule, nfe, spacing, t_start) if times is None else given_times(schedule, times, nfe)
    rows = []
    for i, (now, then, a_t, s_t, a_s, s_s) in enumerate(pairs(schedule, t)):
        std = eta * np.sqrt(s_t**2 - (a_t / a_s) ** 2 * s_s**2) * s_s / s_t
        eps = np.sqrt(s_s**2 - std**2)
        noise = {i: float(std)} if std > 0 else {}
        rows.append(one_step(now, then, eps / s_t, a_s - eps * a_t / s_t, noise, clip))
    return Plan("ddim", tuple(rows), schedule, prediction, float(schedule.sigma(t[0])))

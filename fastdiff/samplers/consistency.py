"""Samplers of few-step models: consistency and sCM (jump to the image, noise it again), LCM, progressive distillation."""

import dataclasses

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import check_nfe, given_times
from fastdiff.samplers._recipe import one_step
from fastdiff.samplers.ddpm import ddim
from fastdiff.schedules import DDPM, Schedule, TrigFlow, karras

LAST_RATIO = 0.4  # sigma / alpha of the last evaluation where a model records no times
SCM_MIDDLE = 1.1  # sCM's second time of two


def consistency(schedule: Schedule, prediction: Prediction, nfe: int, *, times=None, clip: bool = False) -> Plan:
    """x_{i+1} = alpha D(x_i, t_i) + std z at the next time; the last D is the image (Song et al. 2023, algorithm 1).

    std^2 = sigma^2 - sigma_min^2 for networks whose boundary lies at t_min (kind "consistency"), sigma^2 for those whose
    boundary is 0 (ECT, sCM). Without `times` they follow EDM's grid from t_max to sigma / alpha = 0.4; two evaluations on
    TrigFlow are at t_max and 1.1 (Lu and Song 2024).
    """
    check_nfe(nfe, "consistency")
    if times is None and isinstance(schedule, TrigFlow) and nfe == 2:
        t = np.array([schedule.t_max, SCM_MIDDLE])
    elif times is None:
        high = float(schedule.ratio(schedule.t_max))
        t = schedule.time_of(karras(high, LAST_RATIO, nfe))
        t[0] = schedule.t_max
    else:
        t = given_times(schedule, times, nfe)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    floor = float(schedule.sigma(schedule.t_min)) if prediction.kind == "consistency" else 0.0
    rows = []
    for i in range(nfe):
        last = i == nfe - 1
        d = 1.0 if last else float(alpha[i + 1])
        noise = {} if last else {i: float(np.sqrt(sigma[i + 1] ** 2 - floor**2))}
        end = schedule.t_min if last else t[i + 1]
        rows.append(one_step(t[i], end, 0.0, d, noise, clip))
    return Plan("consistency", tuple(rows), schedule, prediction, float(sigma[0]))


def lcm(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    times=None,
    original_steps: int = 50,
    time_scale: float = 10.0,
    sigma_data: float = 0.5,
    clip: bool = False,
) -> Plan:
    """Latent consistency models' steps (Luo et al. 2023): f = c_skip x + c_out D, then noise to the next time.

    c_skip = sd^2 / (s^2 + sd^2), c_out = s / sqrt(s^2 + sd^2) with s = time_scale t. Times by default: every
    `original_steps`-th part of the chain, of which nfe evenly spread ones from the noisiest.
    """
    check_nfe(nfe, "lcm", original_steps)
    if times is None:
        if not isinstance(schedule, DDPM):
            raise ValueError(
                f"schedule: LCM's times are steps of a DDPM chain, not of {type(schedule).__name__}; give times"
            )
        kept = np.arange(1, original_steps + 1)[::-1] * (schedule.T // original_steps) - 1
        times = kept[np.floor(np.linspace(0, original_steps, nfe, endpoint=False)).astype(int)]
    t = given_times(schedule, times, nfe)
    alpha, sigma = np.append(schedule.alpha(t[1:]), 1.0), np.append(schedule.sigma(t[1:]), 0.0)
    ends = np.append(t[1:], schedule.t_min)
    rows = []
    for i in range(nfe):
        s = time_scale * float(t[i])
        skip, out = sigma_data**2 / (s**2 + sigma_data**2), s / np.sqrt(s**2 + sigma_data**2)
        noise = {i: float(sigma[i])} if i < nfe - 1 else {}
        rows.append(one_step(t[i], ends[i], alpha[i] * skip, alpha[i] * out, noise, clip))
    return Plan("lcm", tuple(rows), schedule, prediction, float(schedule.sigma(t[0])))


def progressive(schedule: Schedule, prediction: Prediction, nfe: int, *, clip: bool = True) -> Plan:
    """A progressively distilled student's N = nfe steps (Salimans and Ho 2022): DDIM between times i / N of the range.

    Evaluations at i = N ... 1; the last one's D is the image. Their cosine schedule, log-SNR from 20 to -20, is
    TrigFlow(sigma_data=1, sigma_min=e^-10, sigma_max=e^10).
    """
    check_nfe(nfe, "progressive")
    u = np.arange(nfe, 0, -1) / nfe
    plan = ddim(schedule, prediction, nfe, times=schedule.t_min + u * (schedule.t_max - schedule.t_min), clip=clip)
    return dataclasses.replace(plan, name="progressive")

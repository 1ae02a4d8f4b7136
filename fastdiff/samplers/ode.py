"""Euler and Heun on the probability-flow ODE in EDM's form, with stochastic churn (Karras et al. 2022, algorithm 2).

Written for y = x / alpha at noise level r = sigma / alpha, where every schedule's ODE is dy/dr = (y - D) / r; a row's
coefficients carry the alphas of the times it starts and ends at.
"""

import dataclasses
import math

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan, Row
from fastdiff.samplers._grids import check_nfe, ratio_grid
from fastdiff.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise added before each step: r_hat = r (1 + gamma), gamma = min(S_churn / N, sqrt(2) - 1) for S_min <= r <= S_max."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def gamma(self, r: float, steps: int) -> float:
        return min(self.S_churn / steps, math.sqrt(2) - 1) if self.S_min <= r <= self.S_max else 0.0


def euler(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    rho: float = 7.0,
    ratio_min: float | None = None,  # smallest and largest sigma / alpha; the schedule's own by default
    ratio_max: float | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    clip: bool = False,
) -> Plan:
    """First order: y' = y + (r' - r_hat)(y - D) / r_hat, one evaluation a step."""
    check_nfe(nfe, "euler")
    r = ratio_grid(schedule, nfe, rho, ratio_min, ratio_max)
    return _plan("euler", schedule, prediction, r, Churn(S_churn, S_min, S_max, S_noise), clip)


def heun(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    rho: float = 7.0,
    ratio_min: float | None = None,
    ratio_max: float | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    clip: bool = False,
) -> Plan:
    """Second order, EDM's sampler: an Euler step corrected by the trapezoid rule, except the last: nfe = 2 N - 1."""
    check_nfe(nfe, "heun")
    if nfe % 2 == 0:
        raise ValueError(
            f"nfe: heun makes 2 N - 1 evaluations in N steps, not {nfe}; the nearest are {nfe - 1} and {nfe + 1}"
        )
    r = ratio_grid(schedule, (nfe + 1) // 2, rho, ratio_min, ratio_max)
    return _plan("heun", schedule, prediction, r, Churn(S_churn, S_min, S_max, S_noise), clip)


def _plan(name: str, schedule, prediction, r: np.ndarray, churn: Churn, clip: bool) -> Plan:
    """Rows of N = len(r) steps along r and then to 0. The noise before a step is added by the row that ends there."""
    steps, rows = len(r), []
    r_hat = np.array([float(v) * (1 + churn.gamma(float(v), steps)) for v in r])
    extra = churn.S_noise * np.sqrt(np.maximum(r_hat**2 - r**2, 0))
    # Draws are numbered by the step whose churn they are.
    noise = [{i: float(e)} if e > 0 else {} for i, e in enumerate(extra)]
    t, alpha = _times(schedule, r_hat)
    t_plain, alpha_plain = _times(schedule, r)
    if noise[0]:
        scale = float(alpha[0] / alpha_plain[0])
        start = {k: v * float(alpha[0]) for k, v in noise[0].items()}
        rows.append(Row(float(t_plain[0]), float(t[0]), evaluate=False, x=scale, noise=start))
    for i in range(steps):
        now, a_now, last = float(r_hat[i]), float(alpha[i]), i == steps - 1
        then = 0.0 if last else float(r[i + 1])
        a_end, t_end, churned = (1.0, schedule.t_min, {}) if last else (float(alpha[i + 1]), float(t[i + 1]), noise[i + 1])
        churned = {k: v * a_end for k, v in churned.items()}
        x, d = then / now, 1 - then / now
        if name == "euler" or last:
            rows.append(_row(t[i], t_end, clip, x=x * a_end / a_now, d=d * a_end, noise=churned))
            continue
        a_mid, h = float(alpha_plain[i + 1]), then - now
        rows.append(
            _row(t[i], t_plain[i + 1], clip, x=x * a_mid / a_now, d=d * a_mid, save_x=True, save_d=0, save_clipped=clip)
        )
        rows.append(
            _row(
                t_plain[i + 1],
                t_end,
                clip,
                x=h / (2 * then) * a_end / a_mid,
                d=-h / (2 * then) * a_end,
                saved=(1 + h / (2 * now)) * a_end / a_now,
                history={0: -h / (2 * now) * a_end},
                noise=churned,
            )
        )
    return Plan(name, tuple(rows), schedule, prediction, float(r[0] * alpha_plain[0]))


def _times(schedule: Schedule, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times with sigma / alpha = r, and their alphas."""
    t = schedule.time_of(r)
    return t, schedule.alpha(t)


def _row(t, to, clip, *, d, **rest) -> Row:
    return Row(float(t), float(to), d=0.0 if clip else d, d_clip=d if clip else 0.0, **rest)

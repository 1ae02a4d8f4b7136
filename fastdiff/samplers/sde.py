"""Euler-Maruyama on the reverse SDE dx = (f x - g^2 score) dt + g dw (Song et al. 2021), score = (alpha D - x) / sigma^2."""

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan, Row
from fastdiff.samplers._grids import check_nfe
from fastdiff.schedules import VE, Schedule

VE_END = 1e-5  # the SDE's time at which VE sampling stops


def euler_maruyama(schedule: Schedule, prediction: Prediction, nfe: int, *, clip: bool = False) -> Plan:
    """N = nfe steps of dt = -1/N at linspace(1, end, N); the last one adds no noise.

    The SDE runs in its own time: VP's t from 1 to t_min, and for VE s with sigma(s) = sigma_min (sigma_max/sigma_min)^s
    from 1 to 1e-5.
    """
    check_nfe(nfe, "euler-maruyama")
    if isinstance(schedule, VE):
        t = schedule.level(np.linspace(1.0, VE_END, nfe))
    else:
        t = np.linspace(schedule.t_max, schedule.t_min, nfe)
    f, g2 = schedule.drift_diffusion(t)
    alpha, sigma, dt = schedule.alpha(t), schedule.sigma(t), -1.0 / nfe
    rows = []
    for i in range(nfe):
        pull = g2[i] * dt / sigma[i] ** 2
        d = float(-pull * alpha[i])
        rows.append(
            Row(
                float(t[i]),
                float(t[min(i + 1, nfe - 1)]),
                x=float(1 + f[i] * dt + pull),
                d=0.0 if clip else d,
                d_clip=d if clip else 0.0,
                noise={i: float(np.sqrt(-g2[i] * dt))} if i < nfe - 1 else {},
            )
        )
    return Plan("euler-maruyama", tuple(rows), schedule, prediction, schedule.prior_std)

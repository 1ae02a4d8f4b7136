"""Multistep consistency sampling (Song et al. 2023, algorithm 1): jump to the image, noise it again, jump again."""

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan, Row
from fastdiff.samplers._grids import check_nfe, given_times
from fastdiff.schedules import Schedule, karras

LAST_RATIO = 0.4  # sigma / alpha of the last evaluation where a model records no times


def consistency(schedule: Schedule, prediction: Prediction, nfe: int, *, times=None, clip: bool = False) -> Plan:
    """x_{i+1} = alpha D(x_i, t_i) + std z at the next time; the last D is the image.

    std^2 = sigma^2 - sigma_min^2 for networks whose boundary lies at t_min (kind "consistency"), sigma^2 for those whose
    boundary is 0 (ECT). Without `times` they follow EDM's grid from t_max to sigma / alpha = 0.4.
    """
    check_nfe(nfe, "consistency")
    if times is None:
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
        rows.append(Row(float(t[i]), float(end), d=0.0 if clip else d, d_clip=d if clip else 0.0, noise=noise))
    return Plan("consistency", tuple(rows), schedule, prediction, float(sigma[0]))

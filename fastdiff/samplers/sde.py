"""Predictors and correctors of the reverse SDE dx = (f x - g^2 score) dt + g dw (Song et al. 2021).

score = (alpha D - x) / sigma^2. The SDE runs in its own time: VP's t from 1 to t_min, and for VE s with
sigma(s) = sigma_min (sigma_max / sigma_min)^s from 1 to 1e-5; there are N even levels, and no step to the image itself.
"""

import dataclasses
import math

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.ops.langevin_step import Norms
from fastdiff.plan import Plan
from fastdiff.samplers._grids import check_nfe
from fastdiff.samplers._recipe import Recipe, Vector, z
from fastdiff.schedules import VE, VP, Schedule, SubVP

VE_END = 1e-5  # the SDE's time at which VE sampling stops
PREDICTORS = ("euler-maruyama", "reverse-diffusion", "ancestral")


@dataclasses.dataclass(frozen=True)
class Update:
    """mean = x_ x + score_ score, then noise std, at each of N levels."""

    t: np.ndarray
    x: np.ndarray
    score: np.ndarray
    std: np.ndarray
    alpha: np.ndarray  # the discrete forward step's 1 - beta, which scales the correctors' steps; 1 for VE


def times(schedule: Schedule, n: int) -> np.ndarray:
    """The N levels, in the schedule's own time."""
    if isinstance(schedule, VE):
        return schedule.level(np.linspace(1.0, VE_END, n))
    return np.linspace(schedule.t_max, schedule.t_min, n)


def update_of(schedule: Schedule, n: int, rule: str, probability_flow: bool = False) -> Update:
    """Coefficients of one of PREDICTORS; probability_flow: half of the score and no noise.

    "euler-maruyama" is x + (f x - g^2 score) dt with dt = -1 / N. "reverse-diffusion" and "ancestral" use the discrete
    chain of which the SDE is the limit: beta_i even from beta_0 / N to beta_1 / N (VP), sigma_i geometric (VE), where i is
    t (N - 1) rounded down; sub-VP has none, and reverse diffusion is Euler-Maruyama there.
    """
    if rule not in PREDICTORS:
        raise ValueError(f"predictor: {rule!r} is not known; use one of {', '.join(PREDICTORS)}")
    t, one = times(schedule, n), np.ones(n)
    f, g2 = schedule.drift_diffusion(t)
    half = 0.5 if probability_flow else 1.0
    beta = _betas(schedule, n)
    alpha = 1 - beta
    if rule == "euler-maruyama" or (rule == "reverse-diffusion" and isinstance(schedule, SubVP)):
        x, score, std = 1 - f / n, half * g2 / n, np.sqrt(g2 / n)
    elif isinstance(schedule, VE):
        added, before = _levels(schedule, n)
        small = np.sqrt(added) * before / np.sqrt(added + before**2)
        x, score, std = one, half * added, np.sqrt(added) if rule == "reverse-diffusion" else small
    elif rule == "reverse-diffusion":
        x, score, std = 2 - np.sqrt(alpha), half * beta, np.sqrt(beta)
    elif isinstance(schedule, SubVP):
        raise ValueError("predictor: the ancestral one is defined for VP and VE; use reverse-diffusion for SubVP")
    else:
        x, score, std = 1 / np.sqrt(alpha), beta / np.sqrt(alpha), np.sqrt(beta)
    if probability_flow:
        if rule == "ancestral":
            raise ValueError("probability_flow: ancestral sampling has none; use reverse-diffusion or euler-maruyama")
        std = 0 * one
    return Update(t, x, score, std, alpha)


def _index(n: int, end: float) -> np.ndarray:
    # Rounding must not move t = 1 or exact multiples down by one.
    return np.floor(np.linspace(1.0, end, n) * (n - 1) + 1e-9).astype(int)


def _betas(schedule: Schedule, n: int) -> np.ndarray:
    if not isinstance(schedule, VP):
        return np.zeros(n)
    return np.linspace(schedule.beta_0 / n, schedule.beta_1 / n, n)[_index(n, schedule.t_min)]


def _levels(schedule: VE, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Variance that the discrete step adds, and the level it starts from (0 for the first)."""
    sigma = np.geomspace(schedule.sigma_min, schedule.sigma_max, n)
    before = np.concatenate(([0.0], sigma[:-1]))
    i = _index(n, VE_END)
    return sigma[i] ** 2 - before[i] ** 2, before[i]


def euler_maruyama(schedule: Schedule, prediction: Prediction, nfe: int, *, clip: bool = False) -> Plan:
    """N = nfe steps of dt = -1/N; the last one adds no noise."""
    return reverse_sde(schedule, prediction, nfe, predictor="euler-maruyama", clip=clip)


def reverse_sde(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    predictor: str = "reverse-diffusion",
    probability_flow: bool = False,
    corrector: str | None = None,
    snr: float = 0.16,
    corrections: int = 1,
    norms: str = "sample",
    denoise: bool = True,
    clip: bool = False,
) -> Plan:
    """Predictors alone, or with a Langevin corrector: at each level `corrections` of its steps, then the predictor.

    corrector "langevin": x + eps score + sqrt(2 eps) z with eps = 2 a (snr ||z|| / ||score||)^2, a = 1 - beta_i (VP) or 1
    (VE). norms "sample": each sample's own, so that its image does not depend on the batch; "batch": their averages over
    the batch, as in the original code. corrector "ald", annealed Langevin: eps = 2 a (snr sigma)^2.
    denoise: the last predictor adds no noise. nfe = N (1 + corrections).
    """
    each = 1 + (corrections if corrector else 0)
    name = {None: predictor, "ald": "annealed-langevin"}.get(corrector, "predictor-corrector")
    check_nfe(nfe, name, fewest=each)
    if nfe % each:
        raise ValueError(f"nfe: {name} makes {each} evaluations in each step, not {nfe}; use a multiple of {each}")
    if corrector not in (None, "ald", "langevin"):
        raise ValueError(f"corrector: {corrector!r} is not known; use 'langevin', 'ald' or None")
    if norms not in ("sample", "batch"):
        raise ValueError(f"norms: {norms!r} is not known; use 'sample', or 'batch' for the original's averages")
    n = nfe // each
    chained = corrector is not None or predictor != "euler-maruyama"
    if chained and isinstance(schedule, VP) and n <= schedule.beta_1:
        raise ValueError(
            f"nfe: {name} in {n} steps would have betas of 1 and more; use more than {math.floor(schedule.beta_1) * each}"
        )
    update = update_of(schedule, n, predictor, probability_flow)
    recipe = Recipe(name, schedule, prediction, float(update.t[0]), clip=clip)
    x, draw = recipe.x, 0
    for i, t in enumerate(update.t.tolist()):
        for _ in range(each - 1):
            step = float(2 * update.alpha[i] * snr**2)
            if corrector == "langevin":
                x, draw = recipe.langevin(x, t, step, draw), draw + 1
                continue
            x, score = _look(recipe, x, t)
            step *= float(schedule.sigma(t)) ** 2
            x, draw = x + step * score + np.sqrt(2 * step) * z(draw), draw + 1
        x, score = _look(recipe, x, t)
        x = update.x[i] * x + update.score[i] * score
        if not (i == n - 1 and denoise):
            x = x + update.std[i] * z(draw)
        draw += 1
    plan = recipe.plan(x, float(update.t[-1]), prior_std=schedule.prior_std)
    return dataclasses.replace(plan, norms=Norms[norms.upper()])


def _look(recipe: Recipe, x: Vector, t: float) -> tuple[Vector, Vector]:
    """x and the score there."""
    x, d = recipe.look(x, t)
    alpha, sigma = float(recipe.schedule.alpha(t)), float(recipe.schedule.sigma(t))
    return x, (alpha * d - x) / sigma**2

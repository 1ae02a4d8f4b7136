"""Ancestral samplers and DPM-Solver++ SDE, as in k-diffusion: a deterministic step past the next level, then noise up to it.

From level r to r' the noise is r_up = min(r', eta sqrt(r'^2 (r^2 - r'^2) / r^2)), and the step goes to
r_down = sqrt(r'^2 - r_up^2), in y = x / alpha.
"""

import math

from typing_extensions import Unpack

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan
from fastdiff.samplers._grids import GridOptions, check_nfe, grid
from fastdiff.samplers._recipe import Path, z
from fastdiff.samplers.ode import toward, two_stage_steps
from fastdiff.schedules import Schedule


def split(now: float, then: float, eta: float) -> tuple[float, float]:
    """(r_down, r_up) of a step."""
    up = min(then, eta * math.sqrt(max(then**2 * (now**2 - then**2) / now**2, 0.0)))
    return math.sqrt(max(then**2 - up**2, 0.0)), up


def check_eta(eta: float) -> None:
    if not eta >= 0:
        raise ValueError(f"eta: {eta} is negative; use 0 (the ODE) ... 1 (as noisy as the reverse SDE)")


def euler_ancestral(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    eta: float = 1.0,
    S_noise: float = 1.0,
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """Euler to r_down, then noise r_up: with eta = 1 DDPM's small variance, at any grid."""
    check_nfe(nfe, "euler-ancestral")
    check_eta(eta)
    path = Path("euler-ancestral", grid(schedule, nfe, **where), prediction, clip=clip)
    y = path.y
    for i, now, then in path.steps():
        down, up = split(now, then, eta)
        y, d, _ = path.look(y, now)
        y = toward(y, d, now, down) + S_noise * up * z(i)
    return path.plan(y)


def two_stage_ancestral(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    rule: str = "2s",  # "2s": DPM-Solver++(2S); "dpm2": the geometric midpoint in eps
    eta: float = 1.0,
    S_noise: float = 1.0,
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++2S or DPM2 from r to r_down through sqrt(r r_down), then noise r_up; Euler to 0: nfe = 2 N - 1."""
    if rule not in ("2s", "dpm2"):
        raise ValueError(f"rule: {rule!r} is not known; use '2s' or 'dpm2'")
    name = "dpm-solver++2s-ancestral" if rule == "2s" else "dpm2-ancestral"
    check_eta(eta)
    path = Path(name, grid(schedule, two_stage_steps(nfe, name, where), **where), prediction, clip=clip)
    y = path.y
    for i, now, then in path.steps():
        y, d, _ = path.look(y, now)
        down, up = split(now, then, eta)
        if down == 0:
            y = toward(y, d, now, down) + S_noise * up * z(i)
            continue
        middle = math.sqrt(now * down)
        _, d2, eps2 = path.look(toward(y, d, now, middle), middle)
        end = toward(y, d2, now, down) if rule == "2s" else y + (down - now) * eps2
        y = end + S_noise * up * z(i)
    return path.plan(y)


def dpm_solver_sde(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    eta: float = 1.0,
    middle: float = 0.5,  # where the first stage lies, in log r
    S_noise: float = 1.0,
    clip: bool = False,
    **where: Unpack[GridOptions],
) -> Plan:
    """DPM-Solver++ SDE: two ancestral stages a step; Euler to 0: nfe = 2 N - 1.

    Both stages see one Brownian path W(r): the first its increment from r to the middle level, the second the whole one,
    so step i draws 2 i for the first part and 2 i + 1 for the rest.
    """
    name = "dpm-solver++sde"
    check_eta(eta)
    if not 0 < middle < 1:
        raise ValueError(f"middle: {middle} is out of range; use more than 0 and less than 1")
    path = Path(name, grid(schedule, two_stage_steps(nfe, name, where), **where), prediction, clip=clip)
    y = path.y
    for i, now, then in path.steps():
        y, d, _ = path.look(y, now)
        if then == 0:
            y = toward(y, d, now, then)
            continue
        at = math.exp((1 - middle) * math.log(now) + middle * math.log(then))
        part, rest = z(2 * i), z(2 * i + 1)
        whole = math.sqrt((now - at) / (now - then)) * part + math.sqrt((at - then) / (now - then)) * rest
        down, up = split(now, at, eta)
        _, d2, _ = path.look(toward(y, d, now, down) + S_noise * up * part, at)
        down, up = split(now, then, eta)
        mixed = (1 - 0.5 / middle) * d + 0.5 / middle * d2
        y = toward(y, mixed, now, down) + S_noise * up * whole
    return path.plan(y)

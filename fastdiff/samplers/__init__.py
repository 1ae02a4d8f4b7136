"""Samplers: each a function (schedule, prediction, nfe, options) -> Plan."""

from collections.abc import Callable

from fastdiff.plan import Plan
from fastdiff.samplers.consistency import consistency
from fastdiff.samplers.ddpm import ddim, ddpm
from fastdiff.samplers.ode import euler, heun
from fastdiff.samplers.sde import euler_maruyama

SAMPLERS: dict[str, Callable[..., Plan]] = {
    "consistency": consistency,
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "euler-maruyama": euler_maruyama,
    "heun": heun,
}

__all__ = ["SAMPLERS", "consistency", "ddim", "ddpm", "euler", "euler_maruyama", "heun"]

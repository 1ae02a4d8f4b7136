"""Samplers: each a function (schedule, prediction, nfe, options) -> Plan; SAMPLERS has them by name."""

from fastdiff.samplers._registry import SAMPLERS, Sampler
from fastdiff.samplers.analytic import analytic_ddpm, best_steps, estimate_gamma, fast_ddpm, watson
from fastdiff.samplers.ancestral import dpm_solver_sde, euler_ancestral, two_stage_ancestral
from fastdiff.samplers.consistency import consistency, lcm, progressive
from fastdiff.samplers.ddpm import ddim, ddpm
from fastdiff.samplers.dpm_solver import dpm_solver_multi, dpm_solver_single
from fastdiff.samplers.multistep import deis, ipndm, lms, pndm
from fastdiff.samplers.ode import euler, heun, midpoint
from fastdiff.samplers.restart import restart
from fastdiff.samplers.rk45 import Adaptive, adaptive, rk45
from fastdiff.samplers.san_roman import LevelNetwork, fit_level, san_roman
from fastdiff.samplers.schedulers import of_scheduler
from fastdiff.samplers.sde import euler_maruyama, reverse_sde
from fastdiff.samplers.search import search_times
from fastdiff.samplers.unipc import unipc

__all__ = [
    "SAMPLERS",
    "Adaptive",
    "LevelNetwork",
    "Sampler",
    "adaptive",
    "analytic_ddpm",
    "best_steps",
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "dpm_solver_multi",
    "dpm_solver_sde",
    "dpm_solver_single",
    "estimate_gamma",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "fast_ddpm",
    "fit_level",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "midpoint",
    "of_scheduler",
    "pndm",
    "progressive",
    "restart",
    "reverse_sde",
    "rk45",
    "san_roman",
    "search_times",
    "two_stage_ancestral",
    "unipc",
    "watson",
]

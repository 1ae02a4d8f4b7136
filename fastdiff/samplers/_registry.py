"""Every sampler by name: what makes its plan, its order of convergence, the evaluations it can make, and its paper."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastdiff.plan import Plan
from fastdiff.samplers._grids import GridOptions
from fastdiff.samplers.analytic import analytic_ddpm, fast_ddpm, watson
from fastdiff.samplers.ancestral import dpm_solver_sde, euler_ancestral, two_stage_ancestral
from fastdiff.samplers.consistency import consistency, lcm, progressive
from fastdiff.samplers.ddpm import ddim, ddpm
from fastdiff.samplers.dpm_solver import dpm_solver_multi, dpm_solver_single
from fastdiff.samplers.multistep import deis, ipndm, lms, pndm
from fastdiff.samplers.ode import euler, heun, midpoint
from fastdiff.samplers.restart import restart
from fastdiff.samplers.san_roman import san_roman
from fastdiff.samplers.sde import euler_maruyama, reverse_sde
from fastdiff.samplers.unipc import unipc


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A function (schedule, prediction, nfe, options) -> Plan with its options set, and what is known of it.

    order: how the error of a deterministic one falls with the step; "-" for stochastic and few-step ones.
    """

    make: Callable[..., Plan]
    order: str
    nfe: str
    paper: str
    preset: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, schedule, prediction, nfe: int, **options: Any) -> Plan:
        return self.make(schedule, prediction, nfe, **self.preset | options)

    @functools.cached_property
    def options(self) -> list[str]:
        """Names of what can be passed besides nfe."""
        named = list(inspect.signature(self.make).parameters.values())[3:]
        grid = any(p.kind is p.VAR_KEYWORD for p in named)
        names = [p.name for p in named if p.kind is not p.VAR_KEYWORD and p.name not in self.preset]
        return names + (list(GridOptions.__annotations__) if grid else [])


ANY, ODD, CHAIN = "any", "2 N - 1", "1 ... T"
DPM = "Lu et al. 2022, DPM-Solver"
DPMPP = "Lu et al. 2022, DPM-Solver++"
SONG = "Song et al. 2021, Score-based generative modeling through SDEs"
CROWSON = "Crowson 2022, k-diffusion"
KARRAS = "Karras et al. 2022, Elucidating the design space"

SAMPLERS: dict[str, Sampler] = {
    "analytic-ddpm": Sampler(analytic_ddpm, "-", CHAIN, "Bao et al. 2022, Analytic-DPM"),
    "ancestral": Sampler(reverse_sde, "-", ANY, SONG, {"predictor": "ancestral", "corrector": None}),
    "annealed-langevin": Sampler(reverse_sde, "-", "2 N", SONG, {"predictor": "reverse-diffusion", "corrector": "ald"}),
    "consistency": Sampler(consistency, "-", ANY, "Song et al. 2023, Consistency models; Lu and Song 2024, sCM"),
    "ddim": Sampler(ddim, "1", CHAIN, "Song, Meng, Ermon 2021, DDIM"),
    "ddpm": Sampler(ddpm, "-", CHAIN, "Ho et al. 2020, DDPM; Nichol and Dhariwal 2021"),
    "deis": Sampler(deis, "1 ... 4", ANY, "Zhang and Chen 2023, DEIS"),
    "dpm-solver-2m": Sampler(dpm_solver_multi, "2", ANY, DPM, {"order": 2, "estimate": "eps"}),
    "dpm-solver-2s": Sampler(dpm_solver_single, "2", ANY, DPM, {"order": 2, "estimate": "eps"}),
    "dpm-solver-3m": Sampler(dpm_solver_multi, "3", ANY, DPM, {"order": 3, "estimate": "eps"}),
    "dpm-solver-3s": Sampler(dpm_solver_single, "3", ANY, DPM, {"order": 3, "estimate": "eps"}),
    "dpm-solver++2m": Sampler(dpm_solver_multi, "2", ANY, DPMPP, {"order": 2, "estimate": "x0", "eta": 0.0}),
    "dpm-solver++2s": Sampler(dpm_solver_single, "2", ANY, DPMPP, {"order": 2, "estimate": "x0"}),
    "dpm-solver++2s-ancestral": Sampler(two_stage_ancestral, "-", ODD, CROWSON, {"rule": "2s"}),
    "dpm-solver++3m": Sampler(dpm_solver_multi, "3", ANY, DPMPP, {"order": 3, "estimate": "x0", "eta": 0.0}),
    "dpm-solver++3s": Sampler(dpm_solver_single, "3", ANY, DPMPP, {"order": 3, "estimate": "x0"}),
    "dpm-solver++sde": Sampler(dpm_solver_sde, "-", ODD, DPMPP),
    "dpm2": Sampler(midpoint, "2", ODD, CROWSON, {"mean": "geometric"}),
    "dpm2-ancestral": Sampler(two_stage_ancestral, "-", ODD, CROWSON, {"rule": "dpm2"}),
    "euler": Sampler(euler, "1", ANY, KARRAS),
    "euler-ancestral": Sampler(euler_ancestral, "-", ANY, CROWSON),
    "euler-maruyama": Sampler(euler_maruyama, "-", ANY, SONG),
    "fast-ddpm": Sampler(fast_ddpm, "-", CHAIN, "Kong and Ping 2021, FastDPM"),
    "heun": Sampler(heun, "2", ODD, KARRAS),
    "ipndm": Sampler(ipndm, "2", ANY, "Zhang and Chen 2023, DEIS"),
    "lcm": Sampler(lcm, "-", "1 ... 50", "Luo et al. 2023, Latent consistency models"),
    "lms": Sampler(lms, "1 ... 4", ANY, CROWSON),
    "midpoint": Sampler(midpoint, "2", ODD, KARRAS),
    "pndm": Sampler(pndm, "2", "13 or more", "Liu et al. 2022, PNDM"),
    "predictor-corrector": Sampler(reverse_sde, "-", "2 N", SONG, {"corrector": "langevin"}),
    "progressive": Sampler(progressive, "1", ANY, "Salimans and Ho 2022, Progressive distillation"),
    "restart": Sampler(restart, "-", "8 + 2 N - 1", "Xu et al. 2023, Restart sampling"),
    "reverse-diffusion": Sampler(reverse_sde, "-", ANY, SONG, {"predictor": "reverse-diffusion", "corrector": None}),
    "san-roman": Sampler(san_roman, "-", CHAIN, "San-Roman et al. 2021, Noise estimation"),
    "sde-dpm-solver++2m": Sampler(dpm_solver_multi, "-", ANY, DPMPP, {"order": 2, "estimate": "x0", "eta": 1.0}),
    "sde-dpm-solver++3m": Sampler(dpm_solver_multi, "-", ANY, CROWSON, {"order": 3, "estimate": "x0", "eta": 1.0}),
    "unipc": Sampler(unipc, "order + 1", ANY, "Zhao et al. 2023, UniPC"),
    "watson": Sampler(watson, "-", CHAIN, "Watson et al. 2021, Learning to efficiently sample"),
}

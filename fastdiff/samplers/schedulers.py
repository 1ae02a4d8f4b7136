"""The plans of Hugging Face diffusers' schedulers: what `pipe(num_inference_steps=n)` does, from a configuration.

Each is one of our samplers at the scheduler's own times, with its prior and its clipping. What differs from all of them is
refused with its name. Tested against diffusers itself, tests/checkpoints/test_pipelines.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan, Row
from fastdiff.samplers._grids import check_nfe
from fastdiff.samplers.ancestral import euler_ancestral
from fastdiff.samplers.consistency import consistency
from fastdiff.samplers.ddpm import ddpm
from fastdiff.samplers.dpm_solver import LOWER_AT_THE_END, dpm_solver_multi
from fastdiff.samplers.multistep import deis, lms, pndm
from fastdiff.samplers.ode import euler, heun
from fastdiff.samplers.unipc import unipc
from fastdiff.schedules import DDPM, EDM, Schedule, karras

Config = Mapping[str, Any]


def of_scheduler(schedule: Schedule, prediction: Prediction, nfe: int, config: Config, **options: Any) -> Plan:
    """The plan of a scheduler of diffusers.

    Args:
        nfe: network evaluations. They are num_inference_steps but for Heun (2 steps - 1) and PNDM, whose last evaluation
            has no effect and is left out: steps with skip_prk_steps, steps + 8 without.
        config: the scheduler's configuration, its class under "_class_name".
        options: for DDIM `eta` and `use_clipped_model_output`, which are arguments of its pipeline.

    Raises: ValueError naming the setting that is not carried out here; TypeError for an unknown option.
    """
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name not in SCHEDULERS:
        raise _refused(name, f"only {', '.join(SCHEDULERS)} are")
    make, defaults, allowed = SCHEDULERS[name]
    for option in options:
        if option not in allowed:
            has = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise TypeError(f"{option}: the pipeline's {name} has no such option, {has}; name a sampler=, which has its own")
    check_nfe(nfe, name)
    c = {**COMMON, **defaults, **config}
    for setting, value in FIXED.items():
        if c.get(setting, value) != value and not (setting == "clip_sample_range" and not c.get("clip_sample")):
            raise _refused(f"{name} with {setting} {c[setting]!r}", f"only {value!r} is")
    return make(schedule, prediction, int(nfe), c, **options)


def _refused(what: str, known: str) -> ValueError:
    return ValueError(
        f"scheduler: {what} is not carried out here, {known}. The schedule is read all the same: name a sampler, such as "
        f"sampler='unipc', or run the pipeline with another scheduler"
    )


COMMON: dict[str, Any] = {"timestep_spacing": "linspace", "steps_offset": 0, "thresholding": False, "sample_max_value": 1.0}
FIXED = {
    "clip_sample_range": 1.0,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "disable_corrector": [],
    "solver_p": None,
    "s_noise": 1.0,
}


def _clipped(c: Config) -> bool:
    """Whether D is clamped; thresholding with sample_max_value 1, its default, is the same."""
    if c["thresholding"] and c["sample_max_value"] > 1:
        raise _refused(f"{c['_class_name']} with sample_max_value {c['sample_max_value']}", "only 1 is; see threshold=")
    return bool(c["thresholding"] or c.get("clip_sample"))


def _times(c: Config, T: int, n: int, *, ends: int = 0, last: int | None = None, whole: bool = True) -> np.ndarray:
    """n times, descending. ends=1: those of n + 1, without the last, but for "trailing"; `last` is in place of T."""
    spacing, last = c["timestep_spacing"], T if last is None else last
    if n > last:
        raise ValueError(f"nfe: {c['_class_name']} has {last} times, not {n}; use less")
    if spacing == "linspace":
        even = np.linspace(0, last - 1, n + ends)
        return (np.round(even) if whole else even)[::-1][:n]
    if spacing == "leading":
        return (np.arange(n + ends) * (last // (n + ends)))[::-1][:n] + float(c["steps_offset"])
    if spacing == "trailing":
        return np.round(np.arange(last, 0, -T / n))[:n] - 1
    raise _refused(f"timestep_spacing {spacing!r}", "only linspace, leading and trailing are")


def _chain(schedule: Schedule, c: Config) -> DDPM:
    if not isinstance(schedule, DDPM):
        raise _refused(f"{c['_class_name']} on {type(schedule).__name__}", "only on DDPM it is")
    return schedule


class _Chain(DDPM):
    """DDPM between indices as diffusers has it: log(sigma / alpha) is linear, where ours is log alpha^2."""

    def time_of(self, ratio):
        index = np.arange(self.T)
        return np.interp(np.log(ratio), np.log(self.ratio(index)), index)


def _levels(
    schedule: Schedule, prediction: Prediction, c: Config, times: np.ndarray, *, rounded: bool = False
) -> tuple[Schedule, Prediction, np.ndarray]:
    """The times on the path that the steps follow: with Karras' levels x / alpha, on which the network sees its own."""
    if not c.get("use_karras_sigmas"):
        return schedule, prediction, times
    chain = _chain(schedule, c)
    ends = chain.ratio(np.array([chain.T - 1, 0]) if rounded else times[[0, -1]])
    high, low = (float(r if c.get(key) is None else c[key]) for key, r in zip(("sigma_max", "sigma_min"), ends, strict=True))
    if rounded and chain.law == "cosine":
        raise _refused(f"{c['_class_name']} with use_karras_sigmas", "on a cosine schedule, whose times it truncates")
    own = dataclasses.replace(prediction, trained=_Chain(**dataclasses.asdict(chain)), rounded=rounded)
    return EDM(low, high), own, karras(high, low, len(times))


def _unit(plan: Plan) -> Plan:
    """The plan that starts as diffusers does, with unit variance of x on the chain, where ours start with sigma(t)."""
    alpha, sigma = (float(f(plan.times[0])) for f in (plan.schedule.alpha, plan.schedule.sigma))
    return dataclasses.replace(plan, prior_std=float(np.hypot(alpha, sigma)))


def _ddpm(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
    kinds = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    kind = c["variance_type"]
    if kind not in kinds:
        raise _refused(f"DDPMScheduler with variance_type {kind!r}", f"only {', '.join(kinds)} are")
    times = _times(c, _chain(schedule, c).T, nfe)
    # It adds noise wherever t > 0, in the last step too.
    settings: dict[str, Any] = {"times": times, "denoise": bool(times[-1] == 0), "clip": _clipped(c)}
    return _unit(ddpm(schedule, prediction, nfe, variance=kinds[kind], **settings))


def _ddim(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    c: dict[str, Any],
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> Plan:
    """Steps of T // n whatever the times; eps is the network's own, and so is not that of the clipped D."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is out of range; use 0 (deterministic) ... 1 (as noisy as DDPM)")
    chain = _chain(schedule, c)
    clip, rows = _clipped(c), []
    final = (1.0, 0.0) if c["set_alpha_to_one"] else (float(chain.alpha(0)), float(chain.sigma(0)))
    for i, t in enumerate(_times(c, chain.T, nfe).tolist()):
        s = t - chain.T // nfe
        a_t, s_t = float(chain.alpha(t)), float(chain.sigma(t))
        a_s, s_s = (float(chain.alpha(s)), float(chain.sigma(s))) if s >= 0 else final
        std = eta * np.sqrt(max(s_t**2 - (a_t / a_s) ** 2 * s_s**2, 0.0)) * s_s / s_t
        eps = float(np.sqrt(s_s**2 - std**2)) / s_t
        of_d, of_clipped = (-eps * a_t, a_s) if clip else (a_s - eps * a_t, 0.0)
        if clip and use_clipped_model_output:
            of_d, of_clipped = 0.0, of_d + of_clipped
        noise = {i: float(std)} if std > 0 else {}
        rows.append(Row(t, max(s, 0.0), x=eps, d=of_d, d_clip=of_clipped, noise=noise))
    return Plan("ddim", tuple(rows), schedule, prediction, 1.0)


def _pndm(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
    T = _chain(schedule, c).T
    if c["set_alpha_to_one"] or prediction.kind != "eps":  # of v it combines those of different times
        raise _refused("PNDMScheduler with set_alpha_to_one or v_prediction", "only False and epsilon are")
    more = 1 if c["skip_prk_steps"] else 9
    # An evaluation at t = 0 goes from there to there; where the last time is another, it goes to t = 0.
    n = nfe - more + (0 if c["timestep_spacing"] == "trailing" or c["steps_offset"] else 1)
    if n < 4:
        raise ValueError(f"nfe: {nfe} is not enough; the fewest that this PNDMScheduler can do is {nfe + 4 - n}")
    times = _times(c, T, n)
    step = T // n
    if np.any(np.diff(times) != -step) or (more == 9 and step % 2):
        even = "even " if more == 9 else ""
        raise _refused(f"PNDMScheduler in {n} steps of {T} times", f"only {even}steps of equal length are")
    times = np.append(times, 0.0) if times[-1] > 0 else times
    warmup = "heun" if more == 1 else "runge-kutta"
    return _unit(pndm(schedule, prediction, nfe, warmup=warmup, times=times.tolist(), to_zero=False))


def _ends(c: Config, times: np.ndarray) -> dict[str, Any]:
    """Times and the end of the steps: the image, or the smallest level with "sigma_min"."""
    if c["final_sigmas_type"] == "zero":
        return {"times": times}
    if c["final_sigmas_type"] != "sigma_min" or c.get("use_karras_sigmas") or times[-1] == 0:
        raise _refused(f"final_sigmas_type {c['final_sigmas_type']!r}", "only 'zero' is with these times")
    return {"times": np.append(times, 0.0), "to_zero": False}


def _dpm_solver(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
    chain, order = _chain(schedule, c), c["solver_order"]
    kinds = {"dpmsolver++": ("x0", 0.0), "sde-dpmsolver++": ("x0", 1.0), "dpmsolver": ("eps", 0.0)}
    if c["algorithm_type"] not in kinds:
        raise _refused(f"algorithm_type {c['algorithm_type']!r}", f"only {', '.join(kinds)} are")
    estimate, eta = kinds[c["algorithm_type"]]
    if order == 3 and (eta or c["solver_type"] != "midpoint"):
        raise _refused("the third order of sde-dpmsolver++ or with solver_type 'heun'", "only its second is")
    if c["euler_at_final"] and c["final_sigmas_type"] != "zero":
        raise _refused("euler_at_final with final_sigmas_type 'sigma_min'", "only False is")
    lowest = -np.log(chain.ratio(np.arange(chain.T)))[::-1]
    last = chain.T - int(np.searchsorted(lowest, float(c["lambda_min_clipped"])))
    times = _times(c, chain.T, nfe, ends=1, last=last)
    path, own, times = _levels(schedule, prediction, c, times, rounded=True)
    plan = dpm_solver_multi(
        path,
        own,
        nfe,
        order=order,
        estimate=estimate,
        eta=eta,
        solver={"midpoint": "dpmsolver", "heun": "taylor"}[c["solver_type"]],
        lower_order_final=bool(c["lower_order_final"]) and nfe < LOWER_AT_THE_END,
        clip=_clipped(c),
        **_ends(c, times),
    )
    return _unit(plan)


def _unipc(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
    if not c["lower_order_final"] and c["final_sigmas_type"] == "zero":
        raise _refused("UniPCMultistepScheduler with lower_order_final False", "only True is where it ends at zero")
    times = _times(c, _chain(schedule, c).T, nfe, ends=1)
    path, own, times = _levels(schedule, prediction, c, times, rounded=True)
    plan = unipc(
        path,
        own,
        nfe,
        order=c["solver_order"],
        estimate="x0" if c["predict_x0"] else "eps",
        B=c["solver_type"],
        lower_order_final=bool(c["lower_order_final"]),
        clip=_clipped(c),
        **_ends(c, times),
    )
    return _unit(plan)


def _deis(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
    if _clipped(c) or c.get("use_karras_sigmas"):
        raise _refused("DEISMultistepScheduler with thresholding or use_karras_sigmas", "only without them it is")
    times = np.append(_times(c, _chain(schedule, c).T, nfe, ends=1), 0.0)
    low = bool(c["lower_order_final"]) and nfe < LOWER_AT_THE_END
    settings: dict[str, Any] = {"order": c["solver_order"], "lower_order_final": low, "times": times, "to_zero": False}
    return _unit(deis(schedule, prediction, nfe, **settings))


def _crowson(make: Callable[..., Plan], steps: Callable[[int], int] = lambda nfe: nfe, clips: bool = True):
    """Schedulers after k-diffusion: times between indices, and a start of the largest level instead of unit variance."""

    def plan(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
        times = _times(c, _chain(schedule, c).T, steps(nfe), whole=False)
        path, own, times = _levels(schedule, prediction, c, times)
        ends = _ends(c, times)
        made = make(path, own, nfe, **({"clip": _clipped(c)} if clips else {}), **ends)
        return _unit(made) if c["timestep_spacing"] == "leading" else made

    return plan


def _consistency(schedule: Schedule, prediction: Prediction, nfe: int, c: dict[str, Any]) -> Plan:
    T = c["num_train_timesteps"]
    if nfe > T:
        raise ValueError(f"nfe: {c['_class_name']} has {T} times, not {nfe}; use less")
    ramp = np.arange(nfe) * (T // nfe) / (T - 1)
    high, low = (c[key] ** (1 / c["rho"]) for key in ("sigma_max", "sigma_min"))
    times = (high + ramp * (low - high)) ** c["rho"]
    times[0] = schedule.t_max
    return consistency(schedule, prediction, nfe, times=times, clip=bool(c["clip_denoised"]))


CHAIN = {"timestep_spacing": "leading", "clip_sample": True, "set_alpha_to_one": True, "variance_type": "fixed_small"}
MULTISTEP = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
DPM = MULTISTEP | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
CROWSON = {"final_sigmas_type": "zero"}
PNDM = {"timestep_spacing": "leading", "skip_prk_steps": False, "set_alpha_to_one": False}
CM = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "clip_denoised": True}

# class name -> what makes its plan, its own defaults, the options of its pipeline
SCHEDULERS: dict[str, tuple[Callable[..., Plan], dict[str, Any], tuple[str, ...]]] = {
    "DDPMScheduler": (_ddpm, CHAIN, ()),
    "DDIMScheduler": (_ddim, CHAIN, ("eta", "use_clipped_model_output")),
    "PNDMScheduler": (_pndm, PNDM, ()),
    "DPMSolverMultistepScheduler": (_dpm_solver, DPM | {"lambda_min_clipped": -np.inf}, ()),
    "UniPCMultistepScheduler": (_unipc, MULTISTEP | {"solver_type": "bh2", "predict_x0": True}, ()),
    "DEISMultistepScheduler": (_deis, MULTISTEP, ()),
    "EulerDiscreteScheduler": (_crowson(euler), CROWSON, ()),
    "EulerAncestralDiscreteScheduler": (_crowson(euler_ancestral), CROWSON, ()),
    "HeunDiscreteScheduler": (_crowson(heun, lambda nfe: (nfe + 1) // 2), CROWSON, ()),
    "LMSDiscreteScheduler": (_crowson(lms, clips=False), CROWSON, ()),
    "CMStochasticIterativeScheduler": (_consistency, CM, ()),
}

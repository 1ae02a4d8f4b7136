"""Schedules: how much of the image and how much noise is in x_t = alpha(t) x0 + sigma(t) n.

Everything is float64 numpy on the host: sampling reads the coefficients from a plan's table, training computes them for
a batch of times and sends one small tensor. `t` is each schedule's own time: the noise level for EDM and VE, [0, 1] for
continuous VP, sub-VP and flows, the step index for discrete DDPM.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


class Schedule:
    """alpha(t), sigma(t) and the inverse of their ratio. Sampling starts at t_max and ends at t_min.

    The ratio r(t) = sigma / alpha grows with t and is what samplers of different schedules share: x / alpha follows
    EDM's path with noise level r.
    """

    name: ClassVar[str]

    @property
    def t_min(self) -> float:
        raise NotImplementedError

    @property
    def t_max(self) -> float:
        raise NotImplementedError

    def alpha(self, t: ArrayLike) -> Array:
        raise NotImplementedError

    def sigma(self, t: ArrayLike) -> Array:
        raise NotImplementedError

    def time_of(self, ratio: ArrayLike) -> Array:
        """The t at which sigma / alpha = ratio."""
        raise NotImplementedError

    def ratio(self, t: ArrayLike) -> Array:
        """sigma(t) / alpha(t)."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: ArrayLike) -> Array:
        """2 log(alpha / sigma)."""
        return -2 * np.log(self.ratio(t))

    @property
    def prior_std(self) -> float:
        """Standard deviation of x at t_max, which sampling starts from."""
        return float(self.sigma(self.t_max))

    def drift_diffusion(self, t: ArrayLike) -> tuple[Array, Array]:
        """f(t), g(t)^2 of the forward SDE dx = f x dt + g dw."""
        raise ValueError(f"schedule: {type(self).__name__} has no SDE here; use VP, SubVP or VE")

    def check(self, t: ArrayLike, name: str = "times") -> Array:
        """t as float64, or ValueError where one lies outside [t_min, t_max]."""
        t = np.asarray(t, dtype=np.float64)
        bad = t[~((t >= self.t_min * (1 - 1e-9)) & (t <= self.t_max * (1 + 1e-9)))]
        if bad.size:
            raise ValueError(
                f"{name}: {bad.flat[0]} lies outside {type(self).__name__}'s range {self.t_min} ... {self.t_max}"
            )
        return t


def _f64(t: ArrayLike) -> Array:
    return np.asarray(t, dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = t (Karras et al. 2022)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name: ClassVar[str] = "edm"

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min, sigma_max: {self.sigma_min}, {self.sigma_max}; need 0 < sigma_min < sigma_max")

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t):
        return np.ones_like(_f64(t))

    def sigma(self, t):
        return _f64(t).copy()

    def time_of(self, ratio):
        return _f64(ratio).copy()


@dataclasses.dataclass(frozen=True)
class VE(EDM):
    """alpha = 1, sigma = t with sigma(s) = sigma_min (sigma_max / sigma_min)^s in the SDE's own s (Song et al. 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    name: ClassVar[str] = "ve"

    def level(self, s: ArrayLike) -> Array:
        """sigma at the SDE's time s in [0, 1]."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** _f64(s)

    def drift_diffusion(self, t):
        """With respect to s: f = 0, g^2 = 2 sigma^2 ln(sigma_max / sigma_min)."""
        return np.zeros_like(_f64(t)), 2 * _f64(t) ** 2 * math.log(self.sigma_max / self.sigma_min)


@dataclasses.dataclass(frozen=True)
class VP(Schedule):
    """alpha = exp(-t^2 (b1 - b0) / 4 - t b0 / 2), sigma = sqrt(1 - alpha^2), t in [t_min, 1] (Song et al. 2021)."""

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    name: ClassVar[str] = "vp"

    def log_alpha(self, t: ArrayLike) -> Array:
        t = _f64(t)
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def alpha(self, t):
        return np.exp(self.log_alpha(t))

    def sigma(self, t):
        return np.sqrt(-np.expm1(2 * self.log_alpha(t)))

    def beta(self, t: ArrayLike) -> Array:
        return self.beta_0 + _f64(t) * (self.beta_1 - self.beta_0)

    def _time_of_log_alpha(self, log_alpha: Array) -> Array:
        # Root of (b1-b0)/4 t^2 + b0/2 t + log_alpha = 0, in the form that does not cancel at small t.
        d = self.beta_1 - self.beta_0
        c = -4 * log_alpha
        return c / (self.beta_0 + np.sqrt(self.beta_0**2 + d * c))

    def time_of(self, ratio):
        # ratio^2 = 1/alpha^2 - 1
        return self._time_of_log_alpha(-0.5 * np.log1p(_f64(ratio) ** 2))

    def drift_diffusion(self, t):
        """f = -beta / 2, g^2 = beta."""
        beta = self.beta(t)
        return -0.5 * beta, beta


@dataclasses.dataclass(frozen=True)
class SubVP(VP):
    """VP's alpha with sigma = 1 - alpha^2 (Song et al. 2021)."""

    name: ClassVar[str] = "subvp"

    def sigma(self, t):
        return -np.expm1(2 * self.log_alpha(t))

    def time_of(self, ratio):
        # (1 - a^2)/a = r  =>  1/a = (r + sqrt(r^2 + 4)) / 2
        r = _f64(ratio)
        return self._time_of_log_alpha(-np.arcsinh(r / 2))

    def drift_diffusion(self, t):
        """f = -beta / 2, g^2 = beta (1 - alpha^4)."""
        beta = self.beta(t)
        return -0.5 * beta, beta * -np.expm1(4 * self.log_alpha(t))


@dataclasses.dataclass(frozen=True)
class DDPM(Schedule):
    """Discrete DDPM: alpha_t^2 = prod_{s<=t} (1 - beta_s), t = 0 ... T-1.

    law "linear": beta from beta_start to beta_end (Ho 2020); "scaled_linear": so does its square root (latent diffusion);
    "cosine": alpha_t^2 follows cos^2 with offset 0.008, beta at most 0.999 (Nichol and Dhariwal 2021). Between indices
    log alpha^2 is interpolated linearly.
    """

    T: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    law: str = "linear"
    name: ClassVar[str] = "ddpm"

    def __post_init__(self):
        if self.law not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"law: {self.law!r} is not known; use 'linear', 'scaled_linear' or 'cosine'")
        if self.T < 2:
            raise ValueError(f"T: {self.T} is too small; use at least 2 steps")

    @functools.cached_property
    def _log_alpha2(self) -> Array:
        return np.cumsum(np.log1p(-self.betas))

    @property
    def betas(self) -> Array:
        """beta_0 ... beta_{T-1}."""
        if self.law == "linear":
            return np.linspace(self.beta_start, self.beta_end, self.T)
        if self.law == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.T) ** 2
        f = np.cos((np.arange(self.T + 1) / self.T + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(self.T - 1)

    def log_alpha2(self, t: ArrayLike) -> Array:
        return np.interp(_f64(t), np.arange(self.T), self._log_alpha2)

    def alpha(self, t):
        return np.exp(0.5 * self.log_alpha2(t))

    def sigma(self, t):
        return np.sqrt(-np.expm1(self.log_alpha2(t)))

    def time_of(self, ratio):
        log_alpha2 = -np.log1p(_f64(ratio) ** 2)
        return np.interp(-log_alpha2, -self._log_alpha2, np.arange(self.T))


@dataclasses.dataclass(frozen=True)
class Flow(Schedule):
    """Linear interpolation: alpha = 1 - t, sigma = t (rectified flow, flow matching)."""

    t_min: float = 1e-3
    t_max: float = 0.999
    name: ClassVar[str] = "flow"

    def alpha(self, t):
        return 1 - _f64(t)

    def sigma(self, t):
        return _f64(t).copy()

    def time_of(self, ratio):
        r = _f64(ratio)
        return r / (1 + r)


@dataclasses.dataclass(frozen=True)
class TrigFlow(Schedule):
    """alpha = cos t, sigma = sigma_data sin t (Lu and Song 2024); the ratio is sigma_data tan t."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name: ClassVar[str] = "trigflow"

    @property
    def t_min(self) -> float:
        return math.atan(self.sigma_min / self.sigma_data)

    @property
    def t_max(self) -> float:
        return math.atan(self.sigma_max / self.sigma_data)

    def alpha(self, t):
        return np.cos(_f64(t))

    def sigma(self, t):
        return self.sigma_data * np.sin(_f64(t))

    def time_of(self, ratio):
        return np.arctan(_f64(ratio) / self.sigma_data)


KINDS: dict[str, type[Schedule]] = {cls.name: cls for cls in (EDM, VE, VP, SubVP, DDPM, Flow, TrigFlow)}


def to_dict(schedule: Schedule) -> dict:
    """Plain values from which `from_dict` makes the schedule again."""
    return {"name": schedule.name, **dataclasses.asdict(schedule)}  # type: ignore[call-overload]


def from_dict(values: dict) -> Schedule:
    """The schedule that `to_dict` described."""
    values = dict(values)
    name = values.pop("name", None)
    if name not in KINDS:
        raise ValueError(f"schedule: {name!r} is not known; use one of {', '.join(KINDS)}")
    return KINDS[name](**values)


def karras(ratio_max: float, ratio_min: float, n: int, rho: float = 7.0) -> Array:
    """n noise levels from ratio_max down to ratio_min, evenly spaced in ratio^(1/rho) (Karras 2022, equation 5)."""
    if n == 1:
        return np.array([ratio_max])
    i = np.arange(n) / (n - 1)
    return (ratio_max ** (1 / rho) + i * (ratio_min ** (1 / rho) - ratio_max ** (1 / rho))) ** rho


def log_linear(levels: ArrayLike, n: int) -> Array:
    """n noise levels along a given list, its logarithms interpolated linearly.

    With the two ends alone it is even in log-SNR; with a published list (Align Your Steps' ten, say) it makes that list
    longer or shorter.
    """
    levels = _f64(levels)
    if n == 1:
        return levels[:1].copy()
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(levels)), np.log(levels)))

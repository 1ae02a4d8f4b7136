"""What a network predicts, and the denoiser made of it: D(x, t) = c_skip x + c_out F(c_in x, c_noise).

The preconditioning of every family is written once, here, as four functions of t; targets for training follow from it,
since every one of them is linear in (x0, n).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastdiff import ops
from fastdiff.ops.schedule_coefficients import Column, Law, Target
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, Schedule, SubVP, TrigFlow, from_dict, to_dict

KINDS = ("eps", "x0", "v", "score", "flow", "ve", "edm", "consistency", "trigflow")

# Schedule -> its law in ops.schedule_coefficients and the fields that are the law's p0 and p1.
LAWS: dict[type[Schedule], tuple[Law, tuple[str, ...]]] = {
    EDM: (Law.VE, ()),
    VE: (Law.VE, ()),
    VP: (Law.VP, ("beta_0", "beta_1")),
    SubVP: (Law.SUB_VP, ("beta_0", "beta_1")),
    DDPM: (Law.TABLE, ()),
    Flow: (Law.FLOW, ()),
    TrigFlow: (Law.TRIG, ("sigma_data",)),
}


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """c_skip, c_out, c_in, c_noise at times t, float64 arrays of t's shape."""

    c_skip: np.ndarray
    c_out: np.ndarray
    c_in: np.ndarray
    c_noise: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What F stands for.

    | kind        | F estimates                              | D                                            |
    |-------------|------------------------------------------|----------------------------------------------|
    | eps         | the noise n                              | (x - sigma F) / alpha                        |
    | x0          | the image                                | F                                            |
    | v           | alpha n - sigma x0                       | (alpha x - sigma F) / (alpha^2 + sigma^2)    |
    | score       | grad log p_t = -n / sigma                | (x + sigma^2 F) / alpha                      |
    | flow        | dx/dt = n - x0 (on `Flow`)               | x - t F                                      |
    | ve          | sigma grad log p_t = -n                  | (x + sigma F) / alpha                        |
    | edm         | EDM's F, unit variance in and out        | c_skip x + c_out F, Karras 2022 table 1      |
    | consistency | the same with c_skip(t_min) = 1          | c_skip x + c_out F, Song 2023 appendix C     |
    | trigflow    | cos(t) n - sin(t) x0 / sigma_data        | cos(t) x - sin(t) sigma_data F, sCM; on      |
    |             |                                          | other paths tan(t) = r / sigma_data          |

    c_noise is time_scale t; time_scale ln(sigma / alpha) / 4 for edm and consistency; ln(time_scale sigma) for ve. A raw
    network takes x and t themselves: c_in = 1, c_noise = t.

    trained: the variance-preserving schedule (VP, DDPM) that an eps, x0 or v network knows, where x follows another one. It
    then sees its own path, c_in x at its own time; `rounded`: the nearest index of DDPM. EDM's VP and iDDPM models are such.

    learned_variance: the network returns 2C channels, F and after it the log-variance's place between its bounds.
    """

    kind: str = "eps"
    sigma_data: float = 0.5
    time_scale: float = 1.0
    raw: bool = False
    trained: Schedule | None = None
    rounded: bool = False
    learned_variance: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"prediction: {self.kind!r} is not known; use one of {', '.join(KINDS)}")
        preserving = isinstance(self.trained, (VP, DDPM)) and not isinstance(self.trained, SubVP)
        if self.trained is not None and not (preserving and self.kind in ("eps", "x0", "v")):
            raise ValueError(f"trained: {self.trained} with {self.kind}; use VP or DDPM, and eps, x0 or v")
        if self.rounded and not isinstance(self.trained, DDPM):
            raise ValueError("rounded: only the times of a discrete schedule can be rounded; give trained=DDPM(...)")

    def describe(self) -> dict:
        """Plain values from which `from_dict` makes the prediction again; the last three only where they say something."""
        values = {name: getattr(self, name) for name in ("kind", "sigma_data", "time_scale", "raw")}
        if self.trained is not None:
            values["trained"] = to_dict(self.trained)
        return values | {name: True for name in ("rounded", "learned_variance") if getattr(self, name)}

    @classmethod
    def from_dict(cls, values: dict) -> "Prediction":
        """The prediction that `describe` described."""
        trained = values.get("trained")
        return cls(**(values | {"trained": None if trained is None else from_dict(trained)}))

    def coefficients(self, schedule: Schedule, t: ArrayLike) -> Coefficients:
        """The four coefficients at times t of `schedule`."""
        t = np.asarray(t, dtype=np.float64)
        c = self._coefficients(schedule, t)
        return dataclasses.replace(c, c_in=np.ones_like(t), c_noise=t) if self.raw else c

    def _coefficients(self, schedule: Schedule, t: np.ndarray) -> Coefficients:
        a, s = schedule.alpha(t), schedule.sigma(t)
        one = np.ones_like(t)
        # v, flow and x0 still give D = x0 where x is nothing but noise.
        if self.kind not in ("x0", "v", "flow") and np.any(a <= 0):
            raise ValueError(
                f"schedule: alpha is 0 at t = {t[a <= 0].flat[0] if t.ndim else t} (zero terminal SNR), where prediction "
                f"{self.kind!r} does not determine the image; start at a smaller t or use a model of x0, v or flow"
            )
        if self.kind in ("edm", "consistency", "trigflow"):
            return self._edm(schedule, t)
        if self.trained is not None:
            return self._on_trained_path(schedule, t)
        if self.kind == "flow" and not (np.allclose(a, 1 - t) and np.allclose(s, t)):
            raise ValueError(
                f"prediction: 'flow' is n - x0 on the path of Flow, not of {type(schedule).__name__}; use Flow or v"
            )
        c_noise = np.log(self.time_scale * s) if self.kind == "ve" else t * self.time_scale
        return Coefficients(*self._pair(a, s, t), one, c_noise)

    def _pair(self, a: np.ndarray, s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """c_skip and c_out of the kinds that follow from alpha and sigma."""
        one = np.ones_like(t)
        pairs = {
            "eps": lambda: (1 / a, -s / a),
            "x0": lambda: (0 * one, one),
            "v": lambda: (a / (a**2 + s**2), -s / (a**2 + s**2)),
            "score": lambda: (1 / a, s**2 / a),
            "ve": lambda: (1 / a, s / a),
            "flow": lambda: (one, -t),
        }
        return pairs[self.kind]()

    def _on_trained_path(self, schedule: Schedule, t: np.ndarray) -> Coefficients:
        """What the network's own schedule has at x's sigma / alpha; c_in leads from one path to the other."""
        assert self.trained is not None
        r = schedule.ratio(t)
        own = 1 / np.sqrt(1 + r**2)  # alpha at r on every variance-preserving path
        k = own / schedule.alpha(t)
        c_skip, c_out = self._pair(own, r * own, t)
        time = self._nearest(r) if self.rounded else self.trained.time_of(r)
        return Coefficients(c_skip * k, c_out, k, time * self.time_scale)

    def _nearest(self, r: np.ndarray) -> np.ndarray:
        """The index of the trained schedule whose noise level is nearest to r; -1, no noise, below half the smallest."""
        assert isinstance(self.trained, DDPM)
        levels = np.concatenate(([0.0], self.trained.ratio(np.arange(self.trained.T))))
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, r).astype(np.float64) - 1

    def _edm(self, schedule: Schedule, t: np.ndarray) -> Coefficients:
        # On schedules with alpha != 1 the same formulas hold for x / alpha at noise level r = sigma / alpha.
        a, r, sd = schedule.alpha(t), schedule.ratio(t), self.sigma_data
        shift = schedule.ratio(schedule.t_min) if self.kind == "consistency" else 0.0
        c_skip = sd**2 / ((r - shift) ** 2 + sd**2)
        c_out = (r - shift) * sd / np.sqrt(r**2 + sd**2)
        if self.kind == "trigflow":  # EDM's with F of the other sign and the angle for a time
            return Coefficients(c_skip / a, -c_out, 1 / (a * np.sqrt(r**2 + sd**2)), self.time_scale * np.arctan(r / sd))
        return Coefficients(c_skip / a, c_out, 1 / (a * np.sqrt(r**2 + sd**2)), self.time_scale * np.log(r) / 4)

    def target(self, schedule: Schedule, t: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(b_x0, b_n): what F should be at (t, x0, n) is b_x0 x0 + b_n n, so that D = x0."""
        t = np.asarray(t, dtype=np.float64)
        c = self.coefficients(schedule, t)
        # F = (x0 - c_skip (alpha x0 + sigma n)) / c_out
        return (1 - c.c_skip * schedule.alpha(t)) / c.c_out, -c.c_skip * schedule.sigma(t) / c.c_out


class DeviceCoefficients:
    """Times [...] -> alpha, sigma, log SNR, c_skip, c_out, c_in, c_noise, [..., 7] on t's device; differentiable in t.

    The same numbers as `Prediction.coefficients`, without leaving the device: see `ops.schedule_coefficients`. Where alpha
    is 0 nothing is raised, and what divides by it is infinite.
    """

    @staticmethod
    def know(schedule: Schedule, prediction: Prediction) -> bool:
        """Whether the op has this path: a user's own Schedule and a network trained on another path are left to the host."""
        return type(schedule) in LAWS and prediction.trained is None

    def __init__(self, schedule: Schedule, prediction: Prediction):
        if not self.know(schedule, prediction):
            known = ", ".join(kind.__name__ for kind in LAWS)
            raise ValueError(
                f"schedule: {type(schedule).__name__} is not computed on the device; use one of {known}, and a "
                f"prediction without `trained`, got {prediction}"
            )
        law, fields = LAWS[type(schedule)]
        consistency = prediction.kind == "consistency"
        self.trig = prediction.kind == "trigflow"
        self.scale = 0.0 if prediction.raw else prediction.time_scale
        self.arguments: dict[str, Any] = {
            "law": law,
            "target": Target.EDM if consistency or self.trig else Target[prediction.kind.upper()],
            "sigma_data": prediction.sigma_data,
            "shift": float(schedule.ratio(schedule.t_min)) if consistency else 0.0,
            "time_scale": prediction.time_scale,
            "raw": prediction.raw,
            **{name: getattr(schedule, field) for name, field in zip(("p0", "p1"), fields, strict=False)},
        }
        self.table: Tensor | None = None
        if isinstance(schedule, DDPM):
            with torch.inference_mode(False):  # it outlives the mode that this is made in
                self.table = torch.from_numpy(schedule.log_alpha2(np.arange(schedule.T)))

    def __call__(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if self.table is not None and self.table.device != t.device:
            with torch.inference_mode(False):
                self.table = self.table.to(t.device)
        if self.trig:
            exact = ops.schedule_coefficients(t, table=self.table, dtype=torch.float64, **self.arguments)
            return self._angles(exact).to(dtype or (torch.float64 if t.dtype == torch.float64 else torch.float32))
        return ops.schedule_coefficients(t, table=self.table, dtype=dtype, **self.arguments)

    def _angles(self, columns: Tensor) -> Tensor:
        """TrigFlow's coefficients from EDM's, differentiable in the same way."""
        each = list(columns.unbind(-1))
        each[Column.OUT] = -each[Column.OUT]
        if self.scale:
            tangent = torch.exp(-each[Column.LOG_SNR] / 2) / self.arguments["sigma_data"]
            each[Column.NOISE] = self.scale * torch.atan(tangent)
        return torch.stack(each, -1)


class Denoiser:
    """D(x, t): a network with its schedule and prediction. D is float32 whatever the network computes in."""

    def __init__(self, network, schedule: Schedule, prediction: Prediction):
        self.network, self.schedule, self.prediction = network, schedule, prediction
        known = DeviceCoefficients.know(schedule, prediction)
        self.on_device = DeviceCoefficients(schedule, prediction) if known else None

    def coefficients(self, t: ArrayLike) -> Coefficients:
        return self.prediction.coefficients(self.schedule, t)

    def _columns(self, x: Tensor, t: Tensor | ArrayLike) -> list[Tensor]:
        """c_skip, c_out, c_in, c_noise [B, 1, ...] float32; on the host for times given there and paths that no op knows."""
        if self.on_device is not None and isinstance(t, Tensor):
            table = self.on_device(t.to(x.device).expand(x.shape[0]), torch.float32)[:, Column.SKIP :]
        else:
            t = t.double().cpu().numpy() if isinstance(t, Tensor) else np.asarray(t, dtype=np.float64)
            c = self.coefficients(np.broadcast_to(t, (x.shape[0],)))
            stacked = np.stack((c.c_skip, c.c_out, c.c_in, c.c_noise), -1)
            table = torch.from_numpy(stacked).to(x.device, torch.float32)
        return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in table.t()]

    def __call__(self, x: Tensor, t: Tensor | ArrayLike, labels: Tensor | None = None, **extra: Tensor) -> Tensor:
        """x [B, C, H, W], t [B] or one time for all -> D [B, C, H, W]; `extra` goes to the network.

        A tensor t is not read on the host, and D is differentiable in it, where `DeviceCoefficients.know` the path.
        """
        c_skip, c_out, c_in, c_noise = self._columns(x, t)
        out = self.network(c_in * x, c_noise.flatten(), *([] if labels is None else [labels]), **extra)
        if self.prediction.learned_variance:
            out = out[:, : x.shape[1]]
        return c_skip * x + c_out * out.to(torch.float32)

    def noise(self, x0: Tensor, seeds: Tensor, *times: np.ndarray, draw: int = 0) -> Tensor:
        """x_t for each of `times` [B], all with the same noise: [len(times), B, C, H, W], one fused op."""
        pairs = [np.stack((self.schedule.alpha(t), self.schedule.sigma(t)), -1) for t in times]
        coefficients = torch.from_numpy(np.stack(pairs, 1)).to(x0.device, torch.float32)
        return ops.add_noise(x0, seeds, coefficients, draw)


def edm() -> tuple[Schedule, Prediction]:
    """EDM's schedule and preconditioning at sigma_data 0.5."""
    return EDM(), Prediction("edm")

"""What a network predicts, and the denoiser made of it: D(x, t) = c_skip x + c_out F(c_in x, c_noise).

The preconditioning of every family is written once, here, as four functions of t; targets for training follow from it,
since every one of them is linear in (x0, n).
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastdiff import ops
from fastdiff.schedules import EDM, Schedule

KINDS = ("eps", "x0", "v", "score", "flow", "edm", "consistency")


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
    | edm         | EDM's F, unit variance in and out        | c_skip x + c_out F, Karras 2022 table 1      |
    | consistency | the same with c_skip(t_min) = 1          | c_skip x + c_out F, Song 2023 appendix C     |

    time_scale multiplies t into c_noise for all but edm and consistency, whose c_noise is ln(t) / 4. A raw network
    takes x and t themselves: c_in = 1, c_noise = t.
    """

    kind: str = "eps"
    sigma_data: float = 0.5
    time_scale: float = 1.0
    raw: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"prediction: {self.kind!r} is not known; use one of {', '.join(KINDS)}")

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
        if self.kind in ("edm", "consistency"):
            return self._edm(schedule, t)
        if self.kind == "flow" and not (np.allclose(a, 1 - t) and np.allclose(s, t)):
            raise ValueError(
                f"prediction: 'flow' is n - x0 on the path of Flow, not of {type(schedule).__name__}; use Flow or v"
            )
        pairs = {
            "eps": lambda: (1 / a, -s / a),
            "x0": lambda: (0 * one, one),
            "v": lambda: (a / (a**2 + s**2), -s / (a**2 + s**2)),
            "score": lambda: (1 / a, s**2 / a),
            "flow": lambda: (one, -t),
        }
        c_skip, c_out = pairs[self.kind]()
        return Coefficients(c_skip, c_out, one, t * self.time_scale)

    def _edm(self, schedule: Schedule, t: np.ndarray) -> Coefficients:
        # On schedules with alpha != 1 the same formulas hold for x / alpha at noise level r = sigma / alpha.
        a, r, sd = schedule.alpha(t), schedule.ratio(t), self.sigma_data
        shift = schedule.ratio(schedule.t_min) if self.kind == "consistency" else 0.0
        c_skip = sd**2 / ((r - shift) ** 2 + sd**2)
        c_out = (r - shift) * sd / np.sqrt(r**2 + sd**2)
        return Coefficients(c_skip / a, c_out, 1 / (a * np.sqrt(r**2 + sd**2)), np.log(r) / 4)

    def target(self, schedule: Schedule, t: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(b_x0, b_n): what F should be at (t, x0, n) is b_x0 x0 + b_n n, so that D = x0."""
        t = np.asarray(t, dtype=np.float64)
        c = self.coefficients(schedule, t)
        # F = (x0 - c_skip (alpha x0 + sigma n)) / c_out
        return (1 - c.c_skip * schedule.alpha(t)) / c.c_out, -c.c_skip * schedule.sigma(t) / c.c_out


class Denoiser:
    """D(x, t): a network with its schedule and prediction. D is float32 whatever the network computes in."""

    def __init__(self, network, schedule: Schedule, prediction: Prediction):
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def coefficients(self, t: ArrayLike) -> Coefficients:
        return self.prediction.coefficients(self.schedule, t)

    def __call__(self, x: Tensor, t: Tensor | ArrayLike, labels: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], t [B] (host or tensor) -> D [B, C, H, W]."""
        t = t.double().cpu().numpy() if isinstance(t, Tensor) else np.asarray(t, dtype=np.float64)
        c = self.coefficients(np.broadcast_to(t, (x.shape[0],)))
        table = torch.from_numpy(np.stack((c.c_skip, c.c_out, c.c_in, c.c_noise))).to(x.device, torch.float32)
        c_skip, c_out, c_in, c_noise = table
        spread = (-1, *[1] * (x.dim() - 1))
        out = self.network(c_in.reshape(spread) * x, c_noise, *([] if labels is None else [labels]))
        return c_skip.reshape(spread) * x + c_out.reshape(spread) * out.to(torch.float32)

    def noise(self, x0: Tensor, seeds: Tensor, *times: np.ndarray, draw: int = 0) -> Tensor:
        """x_t for each of `times` [B], all with the same noise: [len(times), B, C, H, W], one fused op."""
        pairs = [np.stack((self.schedule.alpha(t), self.schedule.sigma(t)), -1) for t in times]
        coefficients = torch.from_numpy(np.stack(pairs, 1)).to(x0.device, torch.float32)
        return ops.add_noise(x0, seeds, coefficients, draw)


def edm() -> tuple[Schedule, Prediction]:
    """EDM's schedule and preconditioning at sigma_data 0.5."""
    return EDM(), Prediction("edm")

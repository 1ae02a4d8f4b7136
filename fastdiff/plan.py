"""Plan: a sampler as data, and the one loop that executes it.

A plan is a list of rows. Each is one pass of `denoise_step`: perhaps an evaluation of the network at t, then a linear
combination of what the sampler holds. Rows are float64 on the host and a small table on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.denoiser import Prediction
from fastdiff.ops.denoise_step import HISTORY, C, K
from fastdiff.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Row:
    """x' = x_ x + saved_ saved + d_ D + d_clip_ clamp(D) + sum_j history_[j] H_j + n_1 z_1 + n_2 z_2; see `denoise_step`.

    x is at time t when the row begins and at time `to` when it ends. evaluate=False: the network is not called and D
    does not exist. estimate="eps": the noise eps = (x - alpha D) / sigma takes D's place, in the sum and in the history;
    solvers whose history is of eps cannot be written in D, since eps needs the x of its own evaluation too.
    """

    t: float
    to: float
    evaluate: bool = True
    x: float = 0.0
    saved: float = 0.0
    d: float = 0.0
    d_clip: float = 0.0
    history: dict[int, float] = dataclasses.field(default_factory=dict)
    noise: dict[int, float] = dataclasses.field(default_factory=dict)  # draw -> amount, at most two
    save_x: bool = False
    save_d: int | None = None  # slot of the history
    save_clipped: bool = False
    estimate: str = "x0"

    def __post_init__(self):
        if self.estimate not in ("x0", "eps"):
            raise ValueError(f"Row: estimate {self.estimate!r} is not known; use 'x0' or 'eps'")
        if len(self.noise) > 2 or any(not 0 <= j < HISTORY for j in self.history):
            raise ValueError(f"Row: at most two noise terms and history slots 0 ... {HISTORY - 1}, got {self}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sampler's rows for one schedule and prediction.

    x starts as prior_std times unit noise at rows[0].t. `nfe` is the number of network evaluations.
    """

    name: str
    rows: tuple[Row, ...]
    schedule: Schedule
    prediction: Prediction
    prior_std: float

    @property
    def nfe(self) -> int:
        return sum(row.evaluate for row in self.rows)

    @property
    def times(self) -> list[float]:
        """Where the network looks, in the schedule's own time."""
        return [row.t for row in self.rows if row.evaluate]

    @property
    def slots(self) -> int:
        """How many past D the plan keeps."""
        return 1 + max((row.save_d for row in self.rows if row.save_d is not None), default=-1)

    @property
    def saves(self) -> bool:
        return any(row.save_x for row in self.rows)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients float64 [rows, len(C)] and codes int32 [rows, len(K)]."""
        table, codes = np.zeros((len(self.rows), len(C))), np.zeros((len(self.rows), len(K)), np.int32)
        for i, row in enumerate(self.rows):
            if row.evaluate:
                c = self.prediction.coefficients(self.schedule, row.t)
                skip, out = float(c.c_skip), float(c.c_out)
                if row.estimate == "eps":
                    alpha, sigma = float(self.schedule.alpha(row.t)), float(self.schedule.sigma(row.t))
                    skip, out = (1 - alpha * skip) / sigma, -alpha * out / sigma
                table[i, [C.SKIP, C.OUT, C.NOISE]] = skip, out, c.c_noise
                if i:
                    table[i - 1, C.NEXT_IN] = c.c_in
            table[i, [C.X, C.SAVED, C.D, C.D_CLIP]] = row.x, row.saved, row.d, row.d_clip
            for j, h in row.history.items():
                table[i, C.H0 + j] = h
            for k, (draw, amount) in enumerate(row.noise.items()):
                table[i, C.N1 + k], codes[i, K.DRAW1 + k] = amount, draw
            codes[i, K.SAVE_X] = row.save_x
            codes[i, K.SAVE_D] = -1 if row.save_d is None else row.save_d
            codes[i, K.SAVE_CLIPPED] = row.save_clipped
        return table, codes

    def first_input(self) -> float:
        """c_in of the first row, 1 where it evaluates nothing."""
        first = self.rows[0]
        return float(self.prediction.coefficients(self.schedule, first.t).c_in) if first.evaluate else 1.0

    def describe(self) -> str:
        """One line for reports: name, evaluations, times."""
        times = ", ".join(f"{t:.4g}" for t in self.times[:8]) + (", ..." if self.nfe > 8 else "")
        return f"{self.name}, {self.nfe} evaluation{'s' if self.nfe != 1 else ''} at t = {times}"


@dataclasses.dataclass
class Buffers:
    """Everything the loop writes: made once, then only updated in place."""

    x: Tensor  # float32 [B, C, H, W]
    net_in: Tensor  # [B, C, H, W], the network's dtype and layout
    saved: Tensor  # like x, or empty
    history: Tensor  # [slots, B, C, H, W]
    row: Tensor  # int64 [1]


def prepare(plan: Plan, seeds: Tensor, shape: Sequence[int], dtype: torch.dtype, x_T: Tensor | None = None) -> Buffers:
    """Buffers with x = prior_std times the seeds' initial noise (or the given unit noise x_T) and its c_in multiple."""
    z = ops.philox_normal(seeds, 0, shape) if x_T is None else x_T.to(seeds.device, torch.float32)
    x = z.mul(plan.prior_std)
    net_in = (plan.first_input() * x).to(dtype).contiguous(memory_format=torch.channels_last)
    saved = torch.zeros_like(x) if plan.saves else x.new_empty(0)
    history = x.new_zeros((plan.slots, *x.shape))
    return Buffers(x, net_in, saved, history, torch.zeros(1, dtype=torch.int64, device=x.device))


def execute(
    plan: Plan,
    network: Callable[..., Tensor],
    seeds: Tensor,  # int64 [B]
    shape: Sequence[int],  # (C, H, W)
    labels: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    x_T: Tensor | None = None,
    on_row: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run every row of the plan: x0 float32 [B, C, H, W].

    Nothing here reads the device from the host. on_row(i, x) is called after each row.
    """
    b = prepare(plan, seeds, shape, dtype, x_T)
    tables = plan.tables()
    coefficients = torch.from_numpy(tables[0]).to(b.x.device, b.x.dtype)
    codes = torch.from_numpy(tables[1]).to(b.x.device)
    extra = [] if labels is None else [labels]
    for i, row in enumerate(plan.rows):
        output = None
        if row.evaluate:
            c_noise = coefficients[b.row, C.NOISE].expand(len(seeds))
            output = network(b.net_in, c_noise, *extra)
        ops.denoise_step(b.x, output, b.saved, b.history, b.net_in, seeds, coefficients, codes, b.row)
        b.row += 1
        if on_row is not None:
            on_row(i, b.x)
    return b.x

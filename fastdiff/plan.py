"""Plan: a sampler as data, and the one loop that executes it.

A plan is a list of rows. Each is one pass of `denoise_step`: perhaps an evaluation of the network at t, then a linear
combination of what the sampler holds. Rows are float64 on the host and a small table on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, stepwise
from fastdiff.denoiser import Prediction
from fastdiff.ops.denoise_step import HISTORY, C, K
from fastdiff.ops.langevin_step import L, Norms, langevin_row
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
    langevin: float | None = None  # this row is one `langevin_step` instead, 2 a snr^2 its step, with its noise's first draw
    learned: tuple[float, float] | None = None  # log variances for V = -1 and 1; the noise's first draw gets that deviation

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
    norms: Norms = Norms.SAMPLE  # whose norms set the steps of Langevin rows

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

    @property
    def learns(self) -> bool:
        """Whether a row's noise has the variance that the network gives."""
        return any(row.learned is not None for row in self.rows)

    @property
    def draws(self) -> int:
        """How many draws of noise the rows use, the start not counted."""
        return 1 + max((draw for row in self.rows for draw in row.noise), default=-1)

    def tables(self, interval: tuple[float, float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients float64 [rows, len(C)], codes int32 [rows, len(K)]; guidance where interval holds sigma / alpha."""
        table, codes = np.zeros((len(self.rows), len(C))), np.zeros((len(self.rows), len(K)), np.int32)
        for i, row in enumerate(self.rows):
            if row.evaluate:
                c = self.prediction.coefficients(self.schedule, row.t)
                skip, out = float(c.c_skip), float(c.c_out)
                if row.estimate == "eps":
                    alpha, sigma = float(self.schedule.alpha(row.t)), float(self.schedule.sigma(row.t))
                    skip, out = (1 - alpha * skip) / sigma, -alpha * out / sigma
                table[i, [C.SKIP, C.OUT, C.NOISE]] = skip, out, c.c_noise
                table[i, C.GUIDE] = interval is None or interval[0] <= float(self.schedule.ratio(row.t)) <= interval[1]
                if i:
                    table[i - 1, C.NEXT_IN] = c.c_in
            table[i, [C.X, C.SAVED, C.D, C.D_CLIP]] = row.x, row.saved, row.d, row.d_clip
            for j, h in row.history.items():
                table[i, C.H0 + j] = h
            for k, (draw, amount) in enumerate(row.noise.items()):
                table[i, C.N1 + k], codes[i, K.DRAW1 + k] = amount, draw
            if row.learned is not None:
                table[i, [C.N_V, C.LOG_MIN, C.LOG_MAX]] = 1.0, *row.learned
            codes[i, K.SAVE_X] = row.save_x
            codes[i, K.SAVE_D] = -1 if row.save_d is None else row.save_d
            codes[i, K.SAVE_CLIPPED] = row.save_clipped
        return table, codes

    def langevin_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients float64 [rows, len(L)] and draws int32 [rows] of the rows that are Langevin steps, 0 elsewhere."""
        table, draws = np.zeros((len(self.rows), len(L))), np.zeros(len(self.rows), np.int32)
        for i, row in enumerate(self.rows):
            if row.langevin is None:
                continue
            c = self.prediction.coefficients(self.schedule, row.t)
            alpha, sigma = float(self.schedule.alpha(row.t)), float(self.schedule.sigma(row.t))
            following = self.rows[i + 1 : i + 2]
            next_in = [float(self.prediction.coefficients(self.schedule, r.t).c_in) for r in following if r.evaluate]
            step = (row.langevin, next_in[0] if next_in else 0.0, c.c_noise)
            table[i] = langevin_row(float(c.c_skip), float(c.c_out), alpha, sigma, *step)
            draws[i] = next(iter(row.noise))
        return table, draws

    def first_input(self) -> float:
        """c_in of the first row, 1 where it evaluates nothing."""
        first = self.rows[0]
        return float(self.prediction.coefficients(self.schedule, first.t).c_in) if first.evaluate else 1.0

    def describe(self) -> str:
        """One line for reports: name, evaluations, times."""
        times = ", ".join(f"{t:.4g}" for t in self.times[:8]) + (", ..." if self.nfe > 8 else "")
        return f"{self.name}, {self.nfe} evaluation{'s' if self.nfe != 1 else ''} at t = {times}"


@dataclasses.dataclass(frozen=True)
class Guidance:
    """F_u + weight (F - F_u) in place of F.

    F_u is the network's own output for the labels `without` (classifier-free guidance, one doubled batch) or that of
    another, weaker network (autoguidance). interval: lowest and highest sigma / alpha where it applies.
    """

    weight: Tensor  # [1] or [B]
    without: Tensor | None = None  # int64 [B]
    network: Callable[..., Tensor] | None = None
    interval: tuple[float, float] | None = None

    @property
    def copies(self) -> int:
        """Of the batch in one network call."""
        return 2 if self.network is None else 1


@dataclasses.dataclass
class Buffers:
    """Everything the loop writes: made once, then only updated in place."""

    x: Tensor  # float32 (or float64) [B, C, H, W]
    net_in: Tensor  # [copies B, C, H, W], the network's dtype and layout
    saved: Tensor  # like x, or empty
    history: Tensor  # [slots, B, C, H, W]
    row: Tensor  # int64 [1]


def prepare(
    plan: Plan,
    seeds: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    x_T: Tensor | None = None,
    *,
    start: Tensor | None = None,
    copies: int = 1,
) -> Buffers:
    """Buffers with x = prior_std times the seeds' initial noise (or the given unit noise x_T) and its c_in multiple.

    start: images [B, C, H, W] to which that noise is added, at the plan's first time.
    """
    state = torch.float64 if dtype == torch.float64 else torch.float32
    z = (ops.philox_normal(seeds, 0, shape) if x_T is None else x_T.to(seeds.device)).to(state)
    x = z.mul(plan.prior_std)
    if start is not None:
        x = x + float(plan.schedule.alpha(plan.rows[0].t)) * start.to(x)
    net_in = (plan.first_input() * x).to(dtype).repeat(copies, *[1] * len(shape))
    net_in = net_in.contiguous(memory_format=torch.channels_last) if net_in.dim() == 4 else net_in
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
    noise: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
    guidance: Guidance | None = None,
    adjust: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    on_row: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run every row of the plan: x0 float32 [B, C, H, W], or float64 where dtype is float64.

    Nothing here reads the device from the host. noise: given draws [B, C, H, W] in place of the seeds'. start: see
    `prepare`. adjust(D, unguided D, i) -> D changes the estimate of x0 in row i in ways that no row can. on_row(i, x) is
    called after each row.
    """
    b = prepare(plan, seeds, shape, dtype, x_T, start=start, copies=guidance.copies if guidance else 1)
    table, codes = plan.tables(guidance.interval if guidance else None)
    given = stepwise.given(noise, plan.draws, plan.name, b.x)
    if given is not None:
        table[:, [C.N1, C.N2, C.N_V]] = 0.0
    rows, words = torch.from_numpy(table).to(b.x), torch.from_numpy(codes).to(b.x.device)
    corrector, draws = plan.langevin_tables()
    corrections, draw_words = torch.from_numpy(corrector).to(b.x), torch.from_numpy(draws).to(b.x.device)
    for i, row in enumerate(plan.rows):
        F: Any = None
        F_u = V = weight = None
        if row.evaluate:
            c_noise = rows[b.row, C.NOISE].expand(len(b.net_in))
            F, F_u, V = _evaluate(network, b.net_in, c_noise, labels, guidance, shape[0])
            weight = guidance.weight.to(b.x) if guidance is not None else None
            if adjust is not None or (row.langevin is not None and F_u is not None):
                c = plan.prediction.coefficients(plan.schedule, row.t)
                pair = (float(c.c_skip), float(c.c_out))
                change = (lambda d, one: d) if adjust is None else (lambda d, one, i=i: adjust(d, one, i))
                F, F_u = stepwise.adjusted(b.x, F, F_u, weight, float(table[i, C.GUIDE]), *pair, change), None
        if row.langevin is None:
            _check_variance(row, V, shape[0])
            V = V if plan.learns else None
            weight = None if F_u is None else weight
            ops.denoise_step(b.x, F, b.saved, b.history, b.net_in, seeds, rows, words, b.row, F_u, weight, V)
            if given is not None:
                stepwise.add(given, row.noise, row.learned, V, b.x, b.net_in, float(table[i, C.NEXT_IN]))
        elif given is None:
            _langevin(b, F, seeds, corrections, draw_words, plan.norms)
        else:
            stepwise.langevin(b.x, F, given[next(iter(row.noise))], b.net_in, corrector[i], plan.norms)
        b.row += 1
        if on_row is not None:
            on_row(i, b.x)
    return b.x


def _langevin(b: Buffers, F, seeds: Tensor, table: Tensor, draws: Tensor, norms: Norms) -> None:
    copies = b.net_in.split(max(len(b.x), 1))
    ops.langevin_step(b.x, F, copies[0], seeds, table, draws, b.row, norms)
    for other in copies[1:]:
        other.copy_(copies[0])


def _check_variance(row: Row, V: Tensor | None, channels: int) -> None:
    if row.learned is not None and V is None:
        raise ValueError(
            f"variance: the network returns {channels} channels and no variance, which takes {2 * channels}; use 'large'"
        )


def _evaluate(network, net_in: Tensor, c_noise: Tensor, labels, guidance, channels: int):
    """F, F_u and V, the last two None where there are none."""
    extra = [] if labels is None else [labels]
    if guidance is None:
        out, out_u = network(net_in, c_noise, *extra), None
    elif guidance.network is not None:
        out, out_u = network(net_in, c_noise, *extra), guidance.network(net_in, c_noise, *extra)
    else:
        out, out_u = network(net_in, c_noise, torch.cat([labels, guidance.without])).chunk(2)
    if out.shape[1] == channels:
        return out, out_u, None
    # a network that learns variances returns them in as many channels again
    return out[:, :channels], None if out_u is None else out_u[:, :channels], out[:, channels:]

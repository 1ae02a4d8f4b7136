"""Plan: a sampler as data, and the one loop that executes it.

A plan is a list of rows. Each is one pass of `denoise_step`: perhaps an evaluation of the network at t, then a linear
combination of what the sampler holds. Rows are float64 on the host and a small table on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff import evaluation, ops, stepwise
from fastdiff.denoiser import Prediction
from fastdiff.evaluation import Buffers, Tables
from fastdiff.ops.denoise_step import HISTORY, C, K
from fastdiff.ops.langevin_step import L, Norms, langevin_row
from fastdiff.schedules import Schedule
from fastdiff.stepwise import Guidance


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

    x starts as prior_std times unit noise at rows[0].t. `nfe` is the number of network evaluations. revise(i, x), called
    before row i, returns rows for each sample in place of these (as many, of the same kind), or None to go on as before.
    """

    name: str
    rows: tuple[Row, ...]
    schedule: Schedule
    prediction: Prediction
    prior_std: float
    norms: Norms = Norms.SAMPLE  # whose norms set the steps of Langevin rows
    revise: Callable[[int, Tensor], Sequence[tuple[Row, ...]] | None] | None = None

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
        looks = [i for i, row in enumerate(self.rows) if row.evaluate]
        if looks:
            self._evaluations(table, looks, interval)
        for i, row in enumerate(self.rows):
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

    def _evaluations(self, table: np.ndarray, looks: list[int], interval: tuple[float, float] | None) -> None:
        """What the network's coefficients put into the rows that evaluate."""
        t = np.array([self.rows[i].t for i in looks])
        c = self.prediction.coefficients(self.schedule, t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = np.array([self.rows[i].estimate == "eps" for i in looks])
        table[looks, C.SKIP] = np.where(eps, (1 - alpha * c.c_skip) / sigma, c.c_skip)
        table[looks, C.OUT] = np.where(eps, -alpha * c.c_out / sigma, c.c_out)
        table[looks, C.NOISE] = c.c_noise
        level = self.schedule.ratio(t) if interval else t
        table[looks, C.GUIDE] = 1.0 if interval is None else (interval[0] <= level) & (level <= interval[1])
        before = [i - 1 for i in looks if i]
        table[before, C.NEXT_IN] = c.c_in[len(looks) - len(before) :]

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

    Nothing here reads the device from the host, except a plan that revises its rows. noise: given draws [B, C, H, W] in
    place of the seeds'. start: see `prepare`. adjust(D, unguided D, i) -> D changes the estimate of x0 in row i in ways that
    no row can. on_row(i, x) is called after each row.
    """
    own = getattr(plan, "execute", None)  # of `samplers.Adaptive`, which has no rows
    if own is not None:
        return own(network, seeds, shape, labels, dtype=dtype, x_T=x_T, start=start, guidance=guidance, adjust=adjust)
    b = prepare(plan, seeds, shape, dtype, x_T, start=start, copies=guidance.copies if guidance else 1)
    loop = Loop(plan, network, seeds, labels, b, guidance, adjust, stepwise.given(noise, plan.draws, plan.name, b.x))
    for i in range(len(plan.rows)):
        loop.step(i)
        if on_row is not None:
            on_row(i, b.x)
    return b.x


class Loop:
    """One run of a plan: its tables on the host and on the device, and what each row does with the buffers."""

    def __init__(self, plan: Plan, network, seeds: Tensor, labels, b: Buffers, guidance, adjust, given):
        self.plan, self.network, self.seeds, self.labels, self.b = plan, network, seeds, labels, b
        self.guidance = guidance and dataclasses.replace(guidance, weight=guidance.weight.to(b.x))
        self.adjust, self.given, self.learned = adjust, given, plan.learns
        self.interval = guidance.interval if guidance else None
        # one plan for all samples, or one for each
        self.rows: Sequence[tuple[Row, ...]] = [plan.rows] * (1 if plan.revise is None else len(b.x))
        self.corrector, draws = plan.langevin_tables()
        self.corrections, self.draws = torch.from_numpy(self.corrector).to(b.x), torch.from_numpy(draws).to(b.x.device)
        self._load()
        if plan.revise is not None:
            b.row = torch.arange(len(b.x), device=b.row.device) * len(plan.rows)

    def _load(self) -> None:
        """The tables of self.rows, one after another."""
        each = [dataclasses.replace(self.plan, rows=rows).tables(self.interval) for rows in self.rows]
        self.host = np.stack([table for table, _ in each])  # [1 or B, rows, len(C)]
        table, codes = self.host.reshape(-1, len(C)).copy(), np.concatenate([codes for _, codes in each])
        if self.given is not None:
            table[:, [C.N1, C.N2, C.N_V]] = 0.0
        rows, kinds = torch.from_numpy(table).to(self.b.x), torch.from_numpy(codes).to(self.b.x.device)
        self.tables = Tables(rows, kinds, rows[:, C.NOISE].contiguous(), self.corrections, self.draws)

    def _revise(self, i: int) -> None:
        """Other rows from row i on, a sample's own, where the plan says so."""
        each = self.plan.revise(i, self.b.x) if self.plan.revise is not None else None
        if not each:
            return
        self.rows, b = each, self.b
        self._load()
        c = self.plan.prediction.coefficients(self.plan.schedule, np.array([rows[i].t for rows in each]))
        stepwise.refill(b.net_in, c.c_in, b.x)

    def step(self, i: int) -> None:
        """Carry out row i."""
        self._revise(i)
        row, b, seeds, tables = self.plan.rows[i], self.b, self.seeds, self.tables
        langevin = row.langevin is not None
        if not row.evaluate:
            evaluation.update(b, tables, seeds)
            if self.given is not None:
                stepwise.add(self.given, list(row.noise), self.host[:, i], None, b.x, b.net_in)
        elif self.adjust is not None or self.given is not None or (langevin and self.guidance is not None):
            self._stepwise(i, row)
        elif langevin:
            evaluation.correction(self.network, b, tables, seeds, self.labels, self.plan.norms)
        else:
            evaluation.evaluation(self.network, b, tables, seeds, self.labels, self.guidance, self.learned)

    def _stepwise(self, i: int, row: Row) -> None:
        """An evaluation with something in it that no row can say."""
        b, seeds = self.b, self.seeds
        F, F_u, V = evaluation.outputs(self.network, b, self.tables, self.labels, self.guidance)
        weight = self.guidance.weight if self.guidance and F_u is not None else None
        if self.adjust is not None or row.langevin is not None:  # langevin_step knows no guidance
            F, F_u, weight = self._adjusted(i, F, F_u, weight), None, None
        if row.langevin is None:
            V = evaluation.variance(V, b.x.shape[1]) if self.learned else None
            evaluation.update(b, self.tables, seeds, F, F_u, weight, V)
            if self.given is not None:
                stepwise.add(self.given, list(row.noise), self.host[:, i], V, b.x, b.net_in)
        elif self.given is None:
            evaluation.langevin(b, self.tables, seeds, F, self.plan.norms)
        else:
            z = self.given[next(iter(row.noise))]
            stepwise.langevin(b.x, F, z, b.net_in, self.corrector[i], self.plan.norms)
            b.row.add_(1)

    def _adjusted(self, i: int, F: Tensor, F_u: Tensor | None, weight: Tensor | None) -> Tensor:
        """The output that makes D the adjusted, guided one."""
        t = np.array([rows[i].t for rows in self.rows])
        c = self.plan.prediction.coefficients(self.plan.schedule, t)
        adjust = self.adjust or (lambda d, unguided, i: d)
        change = lambda d, unguided: adjust(d, unguided, i)  # noqa: E731
        x = self.b.x
        d = stepwise.denoised(x, F, F_u, weight, self.host[:, i, C.GUIDE], c.c_skip, c.c_out, change)
        return (d - stepwise.column(c.c_skip, x) * x) / stepwise.column(c.c_out, x)

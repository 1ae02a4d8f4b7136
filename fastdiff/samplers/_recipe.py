"""From a solver's formulas to rows: symbols for what a sampler holds, and the registers they end up in.

A solver is written as plain arithmetic on `Vector`s: linear combinations of the states the network saw, its estimates
there, and draws of noise. `Recipe` notes what each evaluation is made of and gives every value that is needed later a
register: the one saved x, or a slot of the history, as long as it is needed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from fastdiff.denoiser import Prediction
from fastdiff.ops.denoise_step import HISTORY
from fastdiff.plan import Plan, Row
from fastdiff.samplers._grids import Grid
from fastdiff.schedules import Schedule

Symbol = tuple[str, int]  # ("x", stage), ("d", stage), ("z", draw)


def one_step(t: float, to: float, x: float, d: float, noise: dict[int, float], clip: bool) -> Row:
    """The row of a sampler that remembers nothing: x' = x_ x + d_ D, or d_ clamp(D), + noise."""
    x, d = float(x), float(d)
    return Row(float(t), float(to), x=x, d=0.0 if clip else d, d_clip=d if clip else 0.0, noise=noise)


class Vector:
    """sum_k coefficient_k symbol_k."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Symbol, float]):
        self.terms = terms

    def __add__(self, other: "Vector") -> "Vector":
        terms = dict(self.terms)
        for symbol, c in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + c
        return Vector(terms)

    def __mul__(self, c: float) -> "Vector":
        return Vector({symbol: float(c) * v for symbol, v in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> "Vector":
        return -1.0 * self

    def __sub__(self, other: "Vector") -> "Vector":
        return self + -other

    def __truediv__(self, c: float) -> "Vector":
        return Vector({symbol: v / float(c) for symbol, v in self.terms.items()})


def combine(weights: Sequence[float] | np.ndarray, vectors: Sequence[Vector]) -> Vector:
    """sum_j weights_j vectors_j."""
    total = Vector({})
    for w, v in zip(weights, vectors, strict=True):
        total = total + float(w) * v
    return total


def z(draw: int) -> Vector:
    """Unit noise of one draw."""
    return Vector({("z", draw): 1.0})


class Recipe:
    """Collects the stages of a sampler on x itself, and makes the plan.

    estimate: what the network's output is turned into and the history keeps, "x0" (D) or "eps" (x - alpha D) / sigma.
    """

    def __init__(
        self, name: str, schedule: Schedule, prediction: Prediction, t: float, *, clip: bool = False, estimate: str = "x0"
    ):
        if clip and estimate != "x0":
            raise ValueError(f"clip: {name} combines estimates of the noise, which clipping does not bound; leave clip out")
        self.name, self.schedule, self.prediction, self.clip, self.estimate = name, schedule, prediction, clip, estimate
        self.times, self.values, self.evaluated = [float(t)], [Vector({})], [False]
        self.corrections: dict[int, tuple[float, int]] = {}  # stage -> step and draw of a Langevin row

    @property
    def x(self) -> Vector:
        """The state as it is now."""
        return Vector({("x", len(self.times) - 1): 1.0})

    def move(self, x: Vector, t: float) -> Vector:
        """Make x the state at time t; the row that does so is the one before."""
        if x.terms != self.x.terms or self.evaluated[-1]:
            self.times.append(float(t))
            self.values.append(x)
            self.evaluated.append(False)
        return self.x

    def look(self, x: Vector, t: float) -> tuple[Vector, Vector]:
        """Evaluate the network at x and time t: x again, as a symbol of its own, and the estimate there."""
        x = self.move(x, t)
        self.evaluated[-1] = True
        return x, Vector({("d", len(self.times) - 1): 1.0})

    def langevin(self, x: Vector, t: float, step: float, draw: int) -> Vector:
        """x after one `langevin_step` at time t, 2 a snr^2 its step: a state that is no combination of others."""
        x, _ = self.look(x, t)
        self.corrections[len(self.times) - 1] = (step, draw)
        self.times.append(float(t))
        self.values.append(x)
        self.evaluated.append(False)
        return self.x

    def plan(self, x: Vector, t: float, prior_std: float | None = None) -> Plan:
        """The plan that ends with x at time t."""
        self.times.append(float(t))
        self.values.append(x)
        self.evaluated.append(False)
        std = float(self.schedule.sigma(self.times[0])) if prior_std is None else prior_std
        return Plan(self.name, tuple(self._rows()), self.schedule, self.prediction, std)

    def _rows(self) -> list[Row]:
        terms = [{s: c for s, c in value.terms.items() if c != 0.0} for value in self.values]
        last = {symbol: k for k in range(1, len(terms)) for symbol in terms[k] if symbol[0] != "z"}  # stage it last makes
        rows: list[Row] = []
        slots: dict[Symbol, int] = {}  # history
        saved: Symbol | None = None
        for k in range(len(terms) - 1):
            made, here = terms[k + 1], ("d", k)
            if k in self.corrections:
                step, draw = self.corrections[k]
                rows.append(Row(self.times[k], self.times[k + 1], noise={draw: 0.0}, langevin=step))
                continue
            for symbol in made:
                if symbol[0] == "x" and symbol not in (("x", k), saved):
                    raise ValueError(f"{self.name}: two earlier states are needed at once, {symbol} and {saved}")
            history = {slots[s]: c for s, c in made.items() if s[0] == "d" and s != here}
            on_d = made.get(here, 0.0)
            row = Row(
                self.times[k],
                self.times[k + 1],
                self.evaluated[k],
                x=made.get(("x", k), 0.0),
                saved=0.0 if saved is None else made.get(saved, 0.0),
                d=0.0 if self.clip else on_d,
                d_clip=on_d if self.clip else 0.0,
                history=history,
                noise={s[1]: c for s, c in made.items() if s[0] == "z"},
                save_x=last.get(("x", k), 0) > k + 1,
                save_clipped=self.clip,
                estimate=self.estimate,
            )
            saved = ("x", k) if row.save_x else saved
            slots = {s: slot for s, slot in slots.items() if last[s] > k + 1}
            if last.get(here, 0) > k + 1:
                free = set(range(HISTORY)) - set(slots.values())
                if not free:
                    raise ValueError(f"{self.name}: more than {HISTORY} earlier estimates are needed at once")
                slots[here] = min(free)
                row = dataclasses.replace(row, save_d=slots[here])
            rows.append(row)
        return rows


class Path:
    """A recipe in y = x / alpha and r = sigma / alpha, where every schedule's ODE is dy/dr = eps = (y - D) / r."""

    def __init__(self, name: str, grid: Grid, prediction: Prediction, *, clip: bool = False, estimate: str = "x0"):
        self.grid, self.r = grid, [float(r) for r in grid.r]
        self.recipe = Recipe(name, grid.schedule, prediction, grid.t[0], clip=clip, estimate=estimate)
        self._time = dict(zip(self.r, map(float, grid.t), strict=True))

    @property
    def y(self) -> Vector:
        """y at the first level."""
        return self.recipe.x / self.at(self.r[0])[1]

    def at(self, r: float) -> tuple[float, float]:
        """Time and alpha at noise level r; the image itself, alpha = 1, at r = 0."""
        if r == 0:
            return float(self.grid.schedule.t_min), 1.0
        t = self._time.get(r)
        t = float(self.grid.schedule.time_of(r)) if t is None else t
        return t, float(self.grid.schedule.alpha(t))

    def steps(self) -> Iterator[tuple[int, float, float]]:
        """(step, level, next level)."""
        return ((i, now, then) for i, (now, then) in enumerate(pairwise(self.r)))

    def look(self, y: Vector, r: float) -> tuple[Vector, Vector, Vector]:
        """y, D and eps at level r."""
        t, alpha = self.at(r)
        x, d = self.recipe.look(alpha * y, t)
        y = x / alpha
        return (y, d, (y - d) / r) if self.recipe.estimate == "x0" else (y, y - r * d, d)

    def plan(self, y: Vector, r: float | None = None) -> Plan:
        """The plan that ends with y at the grid's last level."""
        t, alpha = self.at(self.r[-1] if r is None else r)
        return self.recipe.plan(alpha * y, t)


def lagrange(nodes: Sequence[float], u: np.ndarray) -> np.ndarray:
    """L_j(u): the polynomials that are 1 at node j and 0 at the others, [len(nodes), *u.shape]."""
    rows = []
    for j, a in enumerate(nodes):
        rows.append(np.prod([(u - b) / (a - b) for k, b in enumerate(nodes) if k != j], axis=0) * np.ones_like(u))
    return np.array(rows)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


def integrate(f, low: float, high: float) -> np.ndarray:
    """Integral of f over [low, high]; f(points) -> [..., points]. 40 Gauss-Legendre points: exact to rounding here."""
    mid, half = (low + high) / 2, (high - low) / 2
    return half * (f(mid + half * _NODES) * _WEIGHTS).sum(-1)


def adams(
    nodes: Sequence[float], now: float, then: float, form: str, variable: str = "log", gain: float = 1.0
) -> np.ndarray:
    """Weights w_j of the Adams rule with estimates at levels `nodes` for the step from level `now` to `then`.

    The polynomial through the estimates, in log r ("log") or r ("ratio"), is integrated exactly:

        eps: y' = y + sum_j w_j eps_j,               w_j = int_now^then L_j dr
        x0:  y' = (then / now)^gain y + sum_j w_j D_j,   w_j = then^gain int L_j d(r^-gain)

    gain is 1 for the ODE and 1 + eta for the SDE that adds eta times its noise.
    """
    if variable == "ratio":
        if form != "eps":
            raise ValueError("adams: polynomials in r are for eps")
        return integrate(lambda r: lagrange(nodes, r), now, then)
    logs = [math.log(n) for n in nodes]
    if form == "eps":
        return integrate(lambda u: lagrange(logs, u) * np.exp(u), math.log(now), math.log(then))
    end = math.log(then)
    return -integrate(lambda u: lagrange(logs, u) * gain * np.exp(gain * (end - u)), math.log(now), end)

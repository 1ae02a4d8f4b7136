"""The probability-flow ODE by Dormand and Prince's adaptive Runge-Kutta 5(4), each sample with steps of its own.

torchdiffeq has one step for a whole batch, so that an image would depend on its neighbours; its other methods are run here
one sample at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops, stepwise
from fastdiff.denoiser import Denoiser, Prediction
from fastdiff.ops.langevin_step import Norms
from fastdiff.plan import Plan
from fastdiff.schedules import Schedule
from fastdiff.stepwise import Guidance

# Dormand and Prince 1980: stages, the fifth-order weights (also the seventh stage), and fifth minus fourth order
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
FIRST = 0.1  # first step in log r; the error control takes it from there


METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")  # all but the first by torchdiffeq
MOST = 10_000
# (x, times [n], which samples these are) -> D
Denoise = Callable[[Tensor, np.ndarray, np.ndarray], Tensor]


class TooManyEvaluations(RuntimeError):
    """An image needs more evaluations than it may take."""


@dataclasses.dataclass(frozen=True)
class Adaptive(Plan):
    """A plan without rows: the ODE's tolerances, and the evaluations of each image as they are counted."""

    most: int = MOST  # evaluations that an image may take
    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    ends: tuple[float, float] = (0.0, 0.0)  # times
    counts: list[int] = dataclasses.field(default_factory=list)

    @property
    def nfe(self) -> int:
        """The most evaluations that an image has taken."""
        return max(self.counts, default=0)

    @property
    def times(self) -> list[float]:
        """Where it begins and ends."""
        return list(self.ends)

    def describe(self) -> str:
        """One line for reports."""
        least = min(self.counts, default=0)
        return f"{self.name}, {least} to {self.nfe} evaluations, rtol {self.rtol:g}, atol {self.atol:g}"

    def execute(
        self,
        network: Callable[..., Tensor],
        seeds: Tensor,
        shape: Sequence[int],
        labels: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        x_T: Tensor | None = None,
        start: Tensor | None = None,
        guidance: Guidance | None = None,
        adjust: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """Images [B, C, H, W]; arguments as in `plan.execute`."""
        schedule, (first, _) = self.schedule, self.ends
        x = (ops.philox_normal(seeds, 0, shape) if x_T is None else x_T.to(seeds.device)).double()
        x = (x if dtype == torch.float64 else x.float()) * self.prior_std
        if start is not None:
            x = x + float(schedule.alpha(first)) * start.to(x)

        def denoise(x: Tensor, t: np.ndarray, active: np.ndarray) -> Tensor:
            index = torch.from_numpy(active).to(x.device)
            here = guidance and dataclasses.replace(
                guidance,
                weight=guidance.weight.to(x)[index] if len(guidance.weight) > 1 else guidance.weight.to(x),
                without=None if guidance.without is None else guidance.without[index],
            )
            c, r = self.prediction.coefficients(schedule, t), schedule.ratio(t)
            net_in = (stepwise.column(c.c_in, x) * x).to(dtype).repeat(here.copies if here else 1, *[1] * (x.dim() - 1))
            net_in = net_in.contiguous(memory_format=torch.channels_last) if net_in.dim() == 4 else net_in
            c_noise = torch.from_numpy(c.c_noise).to(x).repeat(len(net_in) // len(x))
            own = None if labels is None else labels[index]
            F, F_u, _ = stepwise.outputs(network, net_in, c_noise, own, here, x.shape[1])
            low, high = here.interval if here and here.interval else (-np.inf, np.inf)
            guide, weight = (low <= r) & (r <= high), here.weight if here else None
            change = lambda d, unguided: adjust(d, unguided, 0) if adjust else d  # noqa: E731
            return stepwise.denoised(x, F, F_u, weight, guide, c.c_skip, c.c_out, change)

        images, evaluations = _solve(denoise, schedule, x, self.ends, self.rtol, self.atol, self.most, self.method, True)
        self.counts.extend(evaluations.tolist())
        return images


def adaptive(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    t_start: float | None = None,
    t_end: float | None = None,
) -> Adaptive:
    """What `fastdiff.sample(sampler="rk45")` executes: `rk45` from the seeds' noise, at most nfe evaluations an image."""
    most = MOST if nfe is None else nfe
    _check(rtol, atol, most, method)
    ends = _ends(schedule, t_start, t_end)
    return Adaptive(
        "rk45", (), schedule, prediction, float(schedule.sigma(ends[0])), Norms.SAMPLE, None, most, rtol, atol, method, ends
    )


def rk45(
    denoiser: Denoiser,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    most: int = MOST,
    method: str = "dopri5",
    to_image: bool = True,
) -> tuple[Tensor, np.ndarray]:
    """Solve the ODE from x at t_start to t_end and, with to_image, return D there: (images, evaluations of each sample).

    In y = x / alpha and u = log(sigma / alpha) it is dy/du = y - D. Each sample has its own step, accepted where the
    root mean square of error / (atol + rtol max(|y|, |y'|)) is at most 1, so that its result does not depend on the batch;
    those that are done are no longer evaluated.

    Args:
        x: [B, ...] at t_start, float32 or float64, in which the ODE is solved.
        t_start, t_end: the schedule's t_max and t_min by default.
        rtol, atol: tolerances, > 0.
        most: evaluations of a sample after which it gives up with a RuntimeError.
        method: "dopri5", or another adaptive one of torchdiffeq, one sample at a time: "dopri8", "bosh3", ...

    The solver reads the errors on the host after each step: it cannot be captured in a graph.
    """
    _check(rtol, atol, most, method)

    def denoise(x: Tensor, t: np.ndarray, active: np.ndarray) -> Tensor:
        own = None if labels is None else labels[torch.from_numpy(active).to(labels.device)]
        return denoiser(x, t, own)

    ends = _ends(denoiser.schedule, t_start, t_end)
    return _solve(denoise, denoiser.schedule, x, ends, rtol, atol, most, method, to_image)


def _check(rtol: float, atol: float, most: int, method: str) -> None:
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol, atol: {rtol}, {atol}; both must be positive")
    if isinstance(most, bool) or not hasattr(most, "__index__") or most < 1:
        raise ValueError(
            f"nfe: {most!r} is no bound on rk45's evaluations, which are counted; give an integer >= 1, or None"
        )
    if method not in METHODS:
        raise ValueError(f"method: {method!r} is not known; use one of {', '.join(METHODS)}")


def _ends(schedule: Schedule, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    start = schedule.t_max if t_start is None else float(schedule.check(t_start, "t_start"))
    end = schedule.t_min if t_end is None else float(schedule.check(t_end, "t_end"))
    if not end < start:
        raise ValueError(f"t_start, t_end: {start}, {end}; the ODE is solved from much noise to little")
    return start, end


def _solve(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    ends: tuple[float, float],
    rtol: float,
    atol: float,
    most: int,
    method: str,
    to_image: bool,
) -> tuple[Tensor, np.ndarray]:
    """(images, evaluations of each)."""
    solver = _Solver(denoise, schedule, len(x), x.dim(), most)
    first, last = (float(np.log(schedule.ratio(t))) for t in ends)
    y = x / float(schedule.alpha(ends[0]))
    if len(x):
        y = (
            _dopri5(solver, y, first, last, rtol, atol)
            if method == "dopri5"
            else _others(solver, y, first, last, rtol, atol, method)
        )
    if to_image:
        return solver.denoised(y, np.full(len(x), last), np.arange(len(x))), solver.evaluations
    return y * float(schedule.alpha(ends[1])), solver.evaluations


def _dopri5(solver: "_Solver", y: Tensor, first: float, last: float, rtol: float, atol: float) -> Tensor:
    """y at u = last from y at u = first; a step is six evaluations, the last of them the next one's first."""
    u, h, active = np.full(len(y), first), np.full(len(y), -FIRST), np.arange(len(y))
    slope = solver.slope(y, u, active)
    while len(active):
        h[active] = np.maximum(h[active], last - u[active])
        k = [slope[active]]
        step, here = solver.spread(h[active], y), y[active]
        for weights, node in zip(STAGES, NODES, strict=True):
            there = here + step * sum(w * s for w, s in zip(weights, k, strict=True))
            k.append(solver.slope(there, u[active] + node * h[active], active))
        error = step * sum(w * s for w, s in zip(ERROR, k, strict=True))
        scale = atol + rtol * torch.maximum(here.abs(), there.abs())
        size = (error / scale).flatten(1).square().mean(1).sqrt().double().cpu().numpy()
        taken = ~(size > 1)  # NaN counts as taken: the caller's check of the images finds it
        index = torch.from_numpy(active[taken]).to(y.device)
        mask = torch.from_numpy(taken).to(y.device)
        y[index], slope[index] = there[mask], k[-1][mask]
        u[active[taken]] += h[active[taken]]
        with np.errstate(divide="ignore"):
            h[active] *= np.clip(0.9 * size ** (-1 / 5), 0.2, 10.0)
        active = active[u[active] > last + 1e-12]
    return y


def _others(solver: "_Solver", y: Tensor, first: float, last: float, rtol: float, atol: float, method: str) -> Tensor:
    """The same by torchdiffeq, one sample after another."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"method: {method!r} needs torchdiffeq; pip install 'fastdiff[ode]', or use 'dopri5'") from error
    span = torch.tensor([first, last], dtype=torch.float64)
    done = []
    for b in range(len(y)):
        alone = np.array([b])
        slope = lambda u, v, alone=alone: solver.slope(v, np.array([float(u)]), alone)  # noqa: E731
        done.append(odeint(slope, y[b : b + 1], span, rtol=rtol, atol=atol, method=method)[-1])
    return torch.cat(done)


class _Solver:
    """The right-hand side, and how often each sample has asked for it."""

    def __init__(self, denoise: Denoise, schedule: Schedule, n: int, dims: int, most: int):
        self.denoise, self.schedule, self.dims, self.most = denoise, schedule, dims, most
        self.evaluations = np.zeros(n, dtype=int)

    def spread(self, values: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(like).reshape(-1, *[1] * (self.dims - 1))

    def denoised(self, y: Tensor, u: np.ndarray, active: np.ndarray) -> Tensor:
        if len(active) and self.evaluations[active].max() >= self.most:
            raise TooManyEvaluations(
                f"rk45: a sample needs more than {self.most} evaluations; loosen rtol and atol, or allow more"
            )
        self.evaluations[active] += 1
        t = self.schedule.time_of(np.exp(u))
        return self.denoise(self.spread(self.schedule.alpha(t), y) * y, t, active).to(y.dtype)

    def slope(self, y: Tensor, u: np.ndarray, active: np.ndarray) -> Tensor:
        return y - self.denoised(y, u, active)

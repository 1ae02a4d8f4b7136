"""The probability-flow ODE by Dormand and Prince's adaptive Runge-Kutta 5(4), each sample with steps of its own."""

import numpy as np
import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser

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


def rk45(
    denoiser: Denoiser,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    most: int = 10_000,
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
        most: evaluations after which it gives up with a RuntimeError.

    The solver reads the errors on the host after each step: it cannot be captured in a graph.
    """
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"rtol, atol: {rtol}, {atol}; both must be positive")
    schedule = denoiser.schedule
    start = schedule.t_max if t_start is None else float(schedule.check(t_start, "t_start"))
    end = schedule.t_min if t_end is None else float(schedule.check(t_end, "t_end"))
    if not end < start:
        raise ValueError(f"t_start, t_end: {start}, {end}; the ODE is solved from much noise to little")
    solver = _Solver(denoiser, labels, len(x), x.dim())
    u = np.full(len(x), float(np.log(schedule.ratio(start))))
    last = float(np.log(schedule.ratio(end)))
    y, h = x / float(schedule.alpha(start)), np.full(len(x), -FIRST)
    active = np.arange(len(x))
    slope = solver.slope(y, u, active)
    while len(active):
        if solver.evaluations.max() + 6 > most:
            raise RuntimeError(f"rk45: a sample needs more than {most} evaluations; loosen rtol and atol, or raise most")
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
    if to_image:
        y = solver.denoised(y, np.full(len(x), last), np.arange(len(x)))
        return y, solver.evaluations
    return y * float(schedule.alpha(end)), solver.evaluations


class _Solver:
    """The right-hand side, and how often each sample has asked for it."""

    def __init__(self, denoiser: Denoiser, labels: Tensor | None, n: int, dims: int):
        self.denoiser, self.labels, self.dims = denoiser, labels, dims
        self.evaluations = np.zeros(n, dtype=int)

    def spread(self, values: np.ndarray, like: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(like).reshape(-1, *[1] * (self.dims - 1))

    def denoised(self, y: Tensor, u: np.ndarray, active: np.ndarray) -> Tensor:
        self.evaluations[active] += 1
        schedule = self.denoiser.schedule
        t = schedule.time_of(np.exp(u))
        labels = None if self.labels is None else self.labels[torch.from_numpy(active).to(self.labels.device)]
        return self.denoiser(self.spread(schedule.alpha(t), y) * y, t, labels).to(y.dtype)

    def slope(self, y: Tensor, u: np.ndarray, active: np.ndarray) -> Tensor:
        return y - self.denoised(y, u, active)

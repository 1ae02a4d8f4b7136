"""San-Roman, Nachmani and Wolf 2021: read the noise level off x itself, and fit the rest of the schedule to it."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import ops
from fastdiff.denoiser import Prediction
from fastdiff.plan import Plan, Row
from fastdiff.samplers._grids import check_nfe
from fastdiff.samplers._recipe import one_step
from fastdiff.samplers.analytic import short_chain
from fastdiff.samplers.ddpm import most
from fastdiff.schedules import DDPM, VP, Schedule, SubVP

FIRST_BETA = 1e-4  # of the short chain on schedules that have no betas


def san_roman(
    schedule: Schedule,
    prediction: Prediction,
    nfe: int,
    *,
    level: Callable[[Tensor], Tensor] | None = None,
    law: str = "uniform",
    every: int = 1,
    eta: float = 0.0,
    clip: bool = False,
) -> Plan:
    """DDIM's steps (DDPM's with eta = 1) over a short chain of betas that is solved again as x's noise is estimated.

    Before every `every`-th step level(x) says abar = alpha^2 of each image; the n betas left, the first as in the long
    chain, are then those of which prod (1 - beta) = abar. So each image follows a schedule of its own.

    Args:
        level: x [B, C, H, W] -> abar [B] in (0, 1); `fit_level` trains one.
        law: of the betas, even ("uniform"), even in their roots ("quadratic"), or each the sum of the two before it
            ("fibonacci").
        every: steps from one estimate to the next.
    """
    check_nfe(nfe, "san-roman", most(schedule))
    if isinstance(schedule, SubVP) or not isinstance(schedule, (DDPM, VP)):
        raise ValueError(
            f"schedule: San-Roman's chains keep the variance, {type(schedule).__name__} does not; use DDPM or VP"
        )
    if level is None or not callable(level):
        raise ValueError(
            f"level: {level!r} estimates no noise level; give a function x -> alpha^2, such as samplers.fit_level makes"
        )
    if law not in ("uniform", "quadratic", "fibonacci"):
        raise ValueError(f"law: {law!r} is not known; use 'uniform', 'quadratic' or 'fibonacci'")
    if every < 1 or not 0 <= eta <= 1:
        raise ValueError(f"every, eta: {every}, {eta}; use every >= 1 and eta in 0 ... 1")
    chain = _Chain(schedule, law, eta, clip)
    ends = _log_alpha2(schedule, schedule.t_max), _log_alpha2(schedule, schedule.t_min)
    rows = tuple(chain.rows(nfe, ends[0]))

    def revise(i: int, x: Tensor) -> list[tuple[Row, ...]] | None:
        if i == 0 or i % every:
            return None
        found = level(x).detach().double().cpu().numpy().reshape(-1)
        if found.shape != (len(x),):
            raise ValueError(f"level: {found.shape[0]} estimates for {len(x)} images; return one for each")
        with np.errstate(divide="ignore"):
            logs = np.clip(np.log(np.nan_to_num(found).clip(0.0, 1.0)), *ends)
        return [(*rows[:i], *chain.rows(nfe - i, log, i)) for log in logs.tolist()]

    return Plan("san-roman", rows, schedule, prediction, float(schedule.sigma(rows[0].t)), revise=revise)


def _log_alpha2(schedule: Schedule, t: float) -> float:
    return 2 * math.log(float(schedule.alpha(t)))


@dataclasses.dataclass(frozen=True)
class _Chain:
    """DDIM's rows on short chains."""

    schedule: Schedule
    law: str
    eta: float
    clip: bool

    def rows(self, n: int, log_alpha2: float, draw: int = 0) -> list[Row]:
        """The n rows that begin where log alpha^2 is this, their noise from this draw on."""
        first = float(self.schedule.betas[0]) if isinstance(self.schedule, DDPM) else FIRST_BETA
        logs = short_chain(self.law, first, n, log_alpha2)[::-1]
        # levels below the chain's own have its first time
        times = self.schedule.time_of(np.sqrt(np.expm1(-logs))).clip(self.schedule.t_min, self.schedule.t_max)
        ends = np.append(times[1:], self.schedule.t_min)
        alpha, sigma = np.append(np.exp(logs / 2), 1.0), np.append(np.sqrt(-np.expm1(logs)), 0.0)
        rows = []
        for i in range(n):
            a_t, a_s, s_t, s_s = alpha[i], alpha[i + 1], sigma[i], sigma[i + 1]
            std = self.eta * math.sqrt(s_t**2 - (a_t / a_s) ** 2 * s_s**2) * s_s / s_t
            eps = math.sqrt(s_s**2 - std**2)
            noise = {draw + i: std} if self.eta and i < n - 1 else {}
            rows.append(one_step(times[i], ends[i], eps / s_t, a_s - eps * a_t / s_t, noise, self.clip))
        return rows


class LevelNetwork(nn.Module):
    """x [B, C, H, W] -> abar [B]: the logarithms of the energies that learned filters let through, and two layers."""

    def __init__(self, channels: int, filters: int = 8, width: int = 64):
        super().__init__()
        self.filters = nn.Conv2d(channels, filters, 3, bias=False)
        self.hidden, self.out = nn.Linear(filters, width), nn.Linear(width, 1)

    def log_noise(self, x: Tensor) -> Tensor:
        """log(1 - abar), what the loss compares."""
        energy = (self.filters(x.float()).square().mean((2, 3)) + 1e-6).log()
        return functional.logsigmoid(self.out(functional.silu(self.hidden(energy)))[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return -torch.expm1(self.log_noise(x))


def fit_level(
    schedule: Schedule, images: Tensor, *, steps: int = 1000, batch: int = 64, lr: float = 0.1, seed: int = 0
) -> LevelNetwork:
    """Train a `LevelNetwork` on images [n, C, H, W] by the paper's loss, (log(1 - abar) - log(1 - estimate))^2.

    Times are even in the schedule's range. Seconds on a CPU for small images; random state elsewhere stays as it is.
    """
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images: expected [n, C, H, W] with n >= 1, got {tuple(images.shape)}")
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        network = LevelNetwork(images.shape[1])
        optimiser = torch.optim.Adam(network.parameters(), lr=lr)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=lr, total_steps=steps)
        for step in range(steps):
            t = rng.uniform(schedule.t_min, schedule.t_max, batch)
            picked = images[torch.from_numpy(rng.integers(0, len(images), batch))].clone().cpu().float()
            levels = torch.from_numpy(np.stack((schedule.alpha(t), schedule.sigma(t)), -1)[:, None]).float()
            x = ops.add_noise(picked, ops.seed_tensor(range(step * batch, (step + 1) * batch)), levels, 0)[0]
            loss = (network.log_noise(x) - 2 * levels[:, 0, 1].log()).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return network.eval().requires_grad_(False)

"""Watches the loss: what is not a number, or a thousand times what it was for a while, stops a run and is explained."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdiff.training.checkpointing import TrainingError

FACTOR = 1e3  # times the lowest running mean
PATIENCE = 20  # steps in a row
MEMORY = 0.98  # of the running mean


class Guard:
    """Judges (step, loss, gradient norm) in order; `settle` reads what the device has computed meanwhile."""

    def __init__(self, lag: int = 1):
        self.lag, self.high = lag, 0
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        self.mean, self.lowest = math.nan, math.inf

    def add(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Keep a step's numbers on the device; True when it is time to read them."""
        self.pending.append((step, loss, norm))
        return len(self.pending) >= self.lag

    def settle(self, network: nn.Module, lr: float, bf16: bool, kept: Callable[[], str]) -> list[tuple[int, float]]:
        """(step, loss) of what was pending, one read for all. Raises TrainingError where they tell of divergence."""
        if not self.pending:
            return []
        table = torch.stack([torch.stack((loss.float(), norm.float())) for _, loss, norm in self.pending]).tolist()
        steps, self.pending = [step for step, _, _ in self.pending], []
        for step, (loss, norm) in zip(steps, table, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {step}: loss {loss}, gradient norm {norm}. Training diverged. {kept()}. "
                    f"{likely_cause(network, loss, lr, bf16)}"
                )
            self._judge(step, loss, lr, kept)
        return list(zip(steps, (loss for loss, _ in table), strict=True))

    def _judge(self, step: int, loss: float, lr: float, kept: Callable[[], str]) -> None:
        self.high = self.high + 1 if loss > FACTOR * self.lowest else 0
        if self.high >= PATIENCE:
            raise TrainingError(
                f"step {step}: loss {loss:.4g}, more than {FACTOR:g} times its lowest mean {self.lowest:.4g} for {PATIENCE} "
                f"steps. Training exploded. {kept()}. Likely the learning rate {lr} is too high: start again with a lower "
                f"--lr in a new --out"
            )
        self.mean = loss if math.isnan(self.mean) else MEMORY * self.mean + (1 - MEMORY) * loss
        self.lowest = min(self.lowest, max(self.mean, 1e-12))

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "lowest": self.lowest, "high": self.high}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.lowest, self.high = state["mean"], state["lowest"], int(state["high"])


def likely_cause(network: nn.Module, loss: float, lr: float, bf16: bool) -> str:
    """Told from what is finite and what is not."""
    bad = [name for name, p in network.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        return (
            f"The weights {', '.join(bad[:3])} were not finite before this step: the checkpoint they came from is bad, or "
            f"an earlier step overflowed; start again from another --init, or with a lower --lr than {lr}, in a new --out"
        )
    if math.isfinite(loss):
        low = "try --no-bf16, or " if bf16 else ""
        return f"The loss is finite, its gradient is not: {low}start again with a lower --lr than {lr} in a new --out"
    return f"Likely the learning rate {lr} is too high: start again with a lower --lr in a new --out"

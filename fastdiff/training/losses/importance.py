"""Times drawn by the size of their loss (Nichol and Dhariwal 2021, section 3.3)."""

import numpy as np
import torch.distributed as dist
from torch import Tensor

KEPT = 10  # losses per time
UNIFORM = 1e-3  # the share that is drawn uniformly


class ImportantTimes:
    """p_t proportional to sqrt(E L_t^2) over the last 10 losses of each t, uniform until every t has as many.

    What a step saw counts from the next step on, in the order of the samples' seeds: however a batch is split, over
    accumulation or over ranks, the history is the same.
    """

    def __init__(self, T: int):
        self.history = np.full((T, KEPT), np.nan)  # oldest first; nan: not seen yet
        self.seen: list[tuple[Tensor, np.ndarray, Tensor]] = []

    def probabilities(self) -> np.ndarray:
        """p_t [T]."""
        T = len(self.history)
        if np.isnan(self.history).any():
            return np.full(T, 1 / T)
        size = np.sqrt((self.history**2).mean(1))
        return (1 - UNIFORM) * size / size.sum() + UNIFORM / T

    def draw(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """t [B] at the quantiles u, and the weights 1 / (T p_t) that leave the expectation as it was."""
        p = self.probabilities()
        t = np.minimum(np.searchsorted(np.cumsum(p), u, side="right"), len(p) - 1)
        return t, 1 / (len(p) * p[t])

    def remember(self, seeds: Tensor, t: np.ndarray, loss: Tensor) -> None:
        """Keep the losses of one call for `update`; on the device, nothing waits for it."""
        self.seen.append((seeds, t, loss.detach()))

    def update(self) -> None:
        """Take in what was remembered since the last update, by all ranks."""
        rows = [np.stack((s.cpu().numpy(), t, x.double().cpu().numpy().view(np.int64)), 1) for s, t, x in self.seen]
        self.seen.clear()
        mine = np.concatenate(rows) if rows else np.empty((0, 3), dtype=np.int64)
        if dist.is_available() and dist.is_initialized():
            everyone: list[np.ndarray] = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            mine = np.concatenate(everyone)
        mine = mine[np.argsort(mine[:, 0], kind="stable")]
        for t, loss in zip(mine[:, 1], mine[:, 2].copy().view(np.float64), strict=True):
            self.history[t] = np.append(self.history[t, 1:], loss)

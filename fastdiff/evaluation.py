"""One row of a plan on tensors alone: what a compiler or a CUDA graph holds once and replays for every row.

Which row it is, its coefficients, the seeds, labels and guidance weights are values on the device, so that none of them
makes another graph. Each function advances b.row.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from fastdiff import ops, stepwise
from fastdiff.stepwise import Guidance


@dataclasses.dataclass
class Buffers:
    """Everything the loop writes: made once, then only updated in place."""

    x: Tensor  # float32 (or float64) [B, C, H, W]
    net_in: Tensor  # [copies B, C, H, W], the network's dtype and layout
    saved: Tensor  # like x, or empty
    history: Tensor  # [slots, B, C, H, W]
    row: Tensor  # int64 [1], or [B]: a row per sample


@dataclasses.dataclass
class Tables:
    """A plan's rows on the device."""

    rows: Tensor  # [rows, len(C)], x's dtype
    codes: Tensor  # int32 [rows, len(K)]
    times: Tensor  # [rows], c_noise of their evaluations
    corrections: Tensor  # [rows, len(L)], x's dtype
    draws: Tensor  # int32 [rows]


def outputs(
    network: Callable[..., Tensor], b: Buffers, tables: Tables, labels: Tensor | None, guidance: Guidance | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """F, F_u and V of the network at this row's time, the last two None where there are none."""
    c_noise = tables.times.index_select(0, b.row)
    c_noise = c_noise.repeat(len(b.net_in) // max(len(b.x), 1)) if len(c_noise) > 1 else c_noise.expand(len(b.net_in))
    return stepwise.outputs(network, b.net_in, c_noise, labels, guidance, b.x.shape[1])


def evaluation(
    network: Callable[..., Tensor],
    b: Buffers,
    tables: Tables,
    seeds: Tensor,  # int64 [B]
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
    learned: bool = False,  # noise with the variance that the network gives
) -> None:
    """One evaluation of the network, and the update of x from it."""
    F, F_u, V = outputs(network, b, tables, labels, guidance)
    weight = None if F_u is None or guidance is None else guidance.weight
    update(b, tables, seeds, F, F_u, weight, variance(V, b.x.shape[1]) if learned else None)


def variance(V: Tensor | None, channels: int) -> Tensor:
    """V, or ValueError where the network gives none."""
    if V is None:
        raise ValueError(
            f"variance: the network returns {channels} channels and no variance, which takes {2 * channels}; use 'large'"
        )
    return V


def update(
    b: Buffers,
    tables: Tables,
    seeds: Tensor,
    F: Tensor | None = None,
    F_u: Tensor | None = None,
    weight: Tensor | None = None,
    V: Tensor | None = None,
) -> None:
    """x from what the network gave, or without an evaluation: churn, Restart's jumps."""
    ops.denoise_step(b.x, F, b.saved, b.history, b.net_in, seeds, tables.rows, tables.codes, b.row, F_u, weight, V)
    b.row.add_(1)


def correction(
    network: Callable[..., Tensor], b: Buffers, tables: Tables, seeds: Tensor, labels: Tensor | None, norms: int
) -> None:
    """One evaluation and a Langevin step."""
    F, _, _ = outputs(network, b, tables, labels, None)
    langevin(b, tables, seeds, F, norms)


def langevin(b: Buffers, tables: Tables, seeds: Tensor, F: Tensor, norms: int) -> None:
    """x after one Langevin step along F."""
    first, *others = b.net_in.split(max(len(b.x), 1))
    ops.langevin_step(b.x, F, first, seeds, tables.corrections, tables.draws, b.row, norms)
    for other in others:
        other.copy_(first)
    b.row.add_(1)

"""Changes of the estimate D that no row of a plan can make, as they look at a whole image."""

from collections.abc import Callable

import torch
from torch import Tensor


def dynamic_threshold(d: Tensor, quantile: float = 0.995) -> Tensor:
    """D clamped to [-s, s] and divided by s, s the quantile of |D| in each image, at least 1 (Saharia et al. 2022)."""
    if not 0 < quantile <= 1:
        raise ValueError(f"threshold: quantile {quantile} is out of range; use more than 0, at most 1")
    flat = d.flatten(1).abs()
    s = torch.quantile(flat, quantile, dim=1).clamp_(min=1.0).reshape(-1, *[1] * (d.dim() - 1))
    return d.clamp(-s, s) / s


def rescale(d: Tensor, unguided: Tensor, amount: float) -> Tensor:
    """amount times D with the unguided D's standard deviation, plus 1 - amount times D (Lin et al. 2023, section 3.4)."""
    axes = tuple(range(1, d.dim()))
    ratio = unguided.std(axes, keepdim=True) / d.std(axes, keepdim=True).clamp_(min=torch.finfo(d.dtype).tiny)
    return d * (amount * ratio + (1 - amount))


def keep(d: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """D with the known image in place of the estimate where mask is 1 (replacement: Song et al. 2021, appendix I.2).

    Every sampler is linear in D, so known pixels follow the path of the known image exactly, whatever the solver. The others
    see it through the network: an approximation of their distribution given the known ones.
    """
    return torch.lerp(d, known.expand_as(d), mask)  # exact at 0 and at 1


def adjustment(
    threshold: float | None, amount: float, known: Tensor | None = None, mask: Tensor | None = None
) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """What `plan.execute` takes as adjust: `rescale`, then `dynamic_threshold`, then `keep`; None for none of them."""
    if threshold is None and not amount and mask is None:
        return None

    def adjust(d: Tensor, unguided: Tensor, row: int) -> Tensor:
        d = rescale(d, unguided, amount) if amount else d
        d = d if threshold is None else dynamic_threshold(d, threshold)
        return d if mask is None or known is None else keep(d, known.to(d), mask.to(d))

    return adjust

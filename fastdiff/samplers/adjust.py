"""Changes of the estimate D that no row of a plan can make, as they look at a whole image."""

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

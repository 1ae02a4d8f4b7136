"""How far two images are from each other, for the consistency losses: means over pixels, so that the learning rate does
not depend on the resolution."""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from fastdiff.training.losses.base import above, one_of

PERCEPTUAL = ("lpips", "classifier")
METRICS = ("l1", "l2", "huber", *PERCEPTUAL)


@dataclasses.dataclass(frozen=True)
class Distance:
    """d(a, b) -> [B].

    | metric            | d                                                                        |
    |-------------------|--------------------------------------------------------------------------|
    | l1                | mean |a - b|                                                             |
    | l2                | mean (a - b)^2                                                           |
    | huber             | sqrt(mean (a - b)^2 + c^2) - c: iCT's pseudo-Huber over the root of the  |
    |                   | number of pixels; its c there is 0.00054 times that root                 |
    | lpips, classifier | `perceptual`, of `fastdiff.training.perceptual`                          |
    """

    metric: str = "l2"
    c: float = 0.00054
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self):
        one_of("metric", self.metric, METRICS)
        if self.metric in PERCEPTUAL and self.perceptual is None:
            raise ValueError(f"metric: {self.metric!r} needs its network; give perceptual.load({self.metric!r}, ...)")
        above("c", self.c, 0, equal=True)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.perceptual is not None and self.metric in PERCEPTUAL:
            return self.perceptual(a, b)
        difference = (a - b).flatten(1)
        if self.metric == "l1":
            return difference.abs().mean(1)
        squared = difference.square().mean(1)
        if self.metric == "l2":
            return squared
        c = max(self.c, 1e-6)  # keeps the gradient finite where a = b
        return (squared + c**2).sqrt() - c

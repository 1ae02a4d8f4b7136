"""Moving averages of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Averages:
    """Several exponential averages of the same weights: e <- e + (1 - 2^(-batch / h)) (p - e), h each one's half-life.

    Half-lives are in images, so that they keep their meaning at another batch size; `rampup` bounds them by that share of
    the images seen (Karras et al. 2022). One fused kernel updates an average, whatever the number of weights.
    """

    def __init__(self, network: nn.Module, halflives: Iterable[int], rampup: float = 0.05):
        self.halflives, self.rampup = tuple(halflives), rampup
        self._source: list[Tensor] = list(network.parameters())
        self.weights: list[list[Tensor]] = [[p.detach().clone() for p in self._source] for _ in self.halflives]

    @torch.no_grad()  # or the averages would hold the graph of every step, and no resumed run could update them
    def update(self, images: int, batch: int) -> None:
        """After the step with which `images` have been seen."""
        for halflife, weights in zip(self.halflives, self.weights, strict=True):
            h = min(halflife, self.rampup * images) if self.rampup else halflife
            torch._foreach_lerp_(weights, self._source, 1 - 0.5 ** (batch / h))

    @torch.no_grad()
    def copy_to(self, network: nn.Module, which: int = 0) -> None:
        """Give the weights of one average to a network of the same architecture."""
        for p, e in zip(network.parameters(), self.weights[which], strict=True):
            p.copy_(e)

    def state_dict(self) -> list[list[Tensor]]:
        return self.weights

    def load_state_dict(self, state: list[list[Tensor]]) -> None:
        for own, stored in zip(self.weights, state, strict=True):
            torch._foreach_copy_(own, stored)

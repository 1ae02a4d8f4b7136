"""What the embedding gives every block: computed once for each time and label, then looked up."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.unet import UNet

BYTES = 2**26  # most that the table holds


class Conditions:
    """(c_noise [B], labels, augment labels) -> one [B, width] float32 for every block.

    On CPUs rows are kept by time and class, the oldest dropped beyond `BYTES`: an unconditional model at a fixed plan
    computes none at run time. A GPU, where reading a time would stop the host, computes the rows of all blocks as one
    matrix product.
    """

    def __init__(self, network: UNet, layers: Sequence[tuple[nn.Linear, Tensor | None]]):
        self.network, self.layers = network, list(layers)
        self.widths = [layer.out_features for layer, _ in layers]
        self.limit = max(64, BYTES // (4 * sum(self.widths) + 1))
        self.known: dict[tuple[float, int | None], list[Tensor]] = {}
        self.lock = threading.Lock()
        self.stacked: tuple[Tensor, Tensor] | None = None

    def __call__(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> list[Tensor]:
        if c_noise.device.type != "cpu":
            return self._together(c_noise, labels, augment_labels)
        if augment_labels is not None or (labels is not None and labels.dim() != 1):
            return self._compute(c_noise, labels, augment_labels)
        n = len(c_noise)
        times = [c_noise[0].item()] * n if n and c_noise.stride(0) == 0 else c_noise.tolist()
        keys = list(zip(times, [None] * n if labels is None else labels.tolist(), strict=True))
        rows = self._rows(list(dict.fromkeys(keys)))
        if len(rows) == 1:
            return [t.expand(n, -1) for t in rows[keys[0]]]
        return [torch.cat(parts) for parts in zip(*(rows[key] for key in keys), strict=True)]

    def times(self) -> list[float]:
        """The times whose rows are kept for networks without classes."""
        return [time for time, label in self.known if label is None]

    def _rows(self, keys: list[tuple[float, int | None]]) -> dict[tuple[float, int | None], list[Tensor]]:
        with self.lock:
            missing = [key for key in keys if key not in self.known]
            found = {key: self.known[key] for key in keys if key in self.known}
            if missing:
                times = torch.tensor([key[0] for key in missing])
                labels = None if missing[0][1] is None else torch.tensor([key[1] for key in missing])
                parts = [t.split(1) for t in self._compute(times, labels, None)]
                found |= {key: [t[i] for t in parts] for i, key in enumerate(missing)}
                self.known |= {key: found[key] for key in missing}
                while len(self.known) > self.limit:
                    del self.known[next(iter(self.known))]
        return found

    def _compute(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> list[Tensor]:
        e = self.network.embed(c_noise.float(), labels, augment_labels)
        rows = [layer(e) for layer, _ in self.layers]
        return [row if bias is None else row + bias for row, (_, bias) in zip(rows, self.layers, strict=True)]

    def _together(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> list[Tensor]:
        if self.stacked is None:
            weights, biases = zip(*((m.weight, m.bias if b is None else m.bias + b) for m, b in self.layers), strict=True)
            self.stacked = torch.cat(weights).detach(), torch.cat(biases).detach()
        e = self.network.embed(c_noise.float(), labels, augment_labels)
        return list(functional.linear(e, *self.stacked).split(self.widths, 1))

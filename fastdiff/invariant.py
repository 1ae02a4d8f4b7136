"""deterministic=True: a network whose outputs for an image are the same to the bit in every batch."""

from collections.abc import Callable

import torch
from torch import Tensor


class Invariant:
    """network(x, c_noise[, labels]) as if every image were alone.

    Libraries choose algorithms, and with them the order of summation, by the shape of the batch, not by what is in it. So
    the first call of each shape is answered one image at a time and compared with the whole batch: where all bits agree,
    batches of that shape go through whole from then on; where not, one image at a time. Each image gets memory of its own,
    since alignment decides too.
    """

    def __init__(self, network: Callable[..., Tensor]):
        self.network = network
        self.whole: dict[tuple, bool] = {}  # shape and strides -> whether the batch may stay together

    def __call__(self, x: Tensor, c_noise: Tensor, *extra: Tensor) -> Tensor:
        key = (tuple(x.shape), x.stride(), x.dtype)
        if len(x) <= 1 or self.whole.get(key):
            return self.network(x, c_noise, *extra)
        layout = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else None
        alone = torch.cat(
            [
                self.network(*(t[i : i + 1].clone() for t in (x, c_noise, *extra))).to(
                    memory_format=layout or torch.preserve_format
                )
                for i in range(len(x))
            ]
        )
        if key not in self.whole:
            self.whole[key] = torch.equal(self.network(x, c_noise, *extra), alone)
        return alone


def check(deterministic: bool, device: torch.device) -> None:
    """ValueError where nothing is known of the libraries."""
    if deterministic and device.type != "cpu":
        raise ValueError(
            f"deterministic: bits are promised on CPUs, not on {device}; leave it out, images agree to rounding"
        )

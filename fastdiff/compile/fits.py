"""What can be lowered, and whether the weights are still those that were."""

import warnings

import torch
from torch import Tensor, nn

from fastdiff import nn as modules
from fastdiff.ops import implementations, native
from fastdiff.unet import UNet

KNOWN = {
    *(value for value in vars(modules).values() if isinstance(value, type) and issubclass(value, nn.Module)),
    UNet,
    nn.ModuleList,
    nn.Dropout,
    nn.Embedding,
    nn.Identity,
}
REFERENCE = "this processor runs the reference ops"
LOOK = 8  # elements of each weight that `Fingerprint` compares


def obstacle(network) -> str | None:
    """Why the network cannot be lowered, or None."""
    if type(network) is not UNet:
        return f"it is a {type(network).__name__}, no fastdiff.UNet"
    for name, module in network.named_modules():
        if type(module) not in KNOWN:
            return f"its module {name} is a {type(module).__name__}, which fastdiff.UNet does not build"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"its module {name or 'the network'} has forward hooks, which a program would not call"
    tensors = [*network.parameters(), *network.buffers()]
    other = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype != torch.float32), None)
    if other is not None:
        return f"its weights are {other}; network.float() makes them float32"
    devices = {str(t.device) for t in tensors}
    if len(devices) > 1:
        return f"its weights are on several devices, {', '.join(sorted(devices))}; move them to one"
    device = next(iter(devices)).partition(":")[0]
    if device == "cpu" and implementations()["group_norm_silu"]["cpu"].name == "reference":
        return f"{REFERENCE}: {native()}"
    return None


def say_once(text: str) -> None:
    """Warn, the first time in this process."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=4)


_said: set[str] = set()


class Fingerprint:
    """Tells whether a network's weights were changed: their memory, their versions and a few elements of each.

    Every in-place operation of PyTorch counts a version, and one below `.data`, which does not, is seen where it changes an
    element that is looked at: the first, the last and some between.
    """

    def __init__(self, network: nn.Module):
        self.tensors = [t for t in (*network.parameters(), *network.buffers()) if t.numel()]
        self.where, self.looks = self._where(network), self._looks()
        self.values = self._values()

    def _where(self, network: nn.Module) -> list[tuple[int, int]]:
        tensors = [t for t in (*network.parameters(), *network.buffers()) if t.numel()]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _looks(self) -> list[Tensor]:
        flat = [_in_memory(t.detach()) for t in self.tensors]
        return [t[:: max(1, (t.numel() - 1) // LOOK)] for t in flat]

    def _values(self) -> Tensor:
        return torch.cat([t.float() for t in self.looks])

    def holds(self, network: nn.Module) -> bool:
        """Whether the network's weights are still those."""
        return self.where == self._where(network) and bool(torch.equal(self.values, self._values()))


def _in_memory(t: Tensor) -> Tensor:
    """The elements in the order in which they lie, channels-last too: a view, where `flatten` of such a weight is a copy."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).flatten()

"""What can be lowered, and whether the weights are still those that were."""

import warnings

import torch
from torch import Tensor, nn

from fastdiff import nn as ours
from fastdiff.modules import modules_of, tensors_of
from fastdiff.ops import native, served
from fastdiff.unet import UNet

KNOWN = {
    *(value for value in vars(ours).values() if isinstance(value, type) and issubclass(value, nn.Module)),
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
    modules = modules_of(network)
    if any(type(m) not in KNOWN or m._forward_hooks or m._forward_pre_hooks for m in modules):
        return _unknown(network)
    tensors = tensors_of(modules)
    other = next((kind for kind in {t.dtype for t in tensors} if kind != torch.float32 and kind.is_floating_point), None)
    if other is not None:
        return f"its weights are {other}; network.float() makes them float32"
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return f"its weights are on several devices, {', '.join(sorted(map(str, devices)))}; move them to one"
    if next(iter(devices)).type == "cpu" and served("group_norm_silu", "cpu").name == "reference":
        return f"{REFERENCE}: {native()}"
    return None


def _unknown(network: nn.Module) -> str | None:
    """The module that cannot be lowered, by its name."""
    for name, module in network.named_modules():
        if type(module) not in KNOWN:
            return f"its module {name} is a {type(module).__name__}, which fastdiff.UNet does not build"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"its module {name or 'the network'} has forward hooks, which a program would not call"
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
        tensors = tensors_of(modules_of(network))
        self.where = _where(tensors)
        flat = [_in_memory(t.detach()) for t in tensors if t.numel()]
        self.looks = [t[:: max(1, (t.numel() - 1) // LOOK)] for t in flat]
        self.alike = len({t.dtype for t in flat}) == 1
        self.values = self._values()

    def _values(self) -> Tensor:
        return torch.cat(self.looks if self.alike else [t.float() for t in self.looks])

    def holds(self, network: nn.Module) -> bool:
        """Whether the network's weights are still those."""
        return self.where == _where(tensors_of(modules_of(network))) and bool(torch.equal(self.values, self._values()))


def _where(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _in_memory(t: Tensor) -> Tensor:
    """The elements in the order in which they lie, channels-last too: a view, where `flatten` of such a weight is a copy."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).flatten()

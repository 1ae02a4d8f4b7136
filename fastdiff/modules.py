"""A network's modules and tensors for what asks at every call: `Module.modules` and its kin take ten times as long."""

from collections.abc import Iterable

from torch import Tensor, nn


def modules_of(network: nn.Module) -> list[nn.Module]:
    """Every module once, the network first."""
    found, waiting = dict[nn.Module, None](), [network]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting.extend(child for child in module._modules.values() if child is not None)
    return list(found)


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Their parameters and buffers, a shared one as often as it is there."""
    return [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

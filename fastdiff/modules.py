"""A network's modules and tensors for what asks at every call: `Module.modules` and its kin take ten times as long."""

from collections.abc import Iterable

from torch import Tensor, nn


def modules_of(network: nn.Module) -> list[nn.Module]:
    """Every module once, the network first."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [network]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                waiting.extend(module._modules.values())
    return list(found)


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Their parameters and buffers, a shared one as often as it is there."""
    held = [tensors for m in modules for tensors in (m._parameters, m._buffers) if tensors]
    return [t for tensors in held for t in tensors.values() if t is not None]

"""A module gets a faster forward by getting another class: what it holds, and who it is, stays as it was.

The new class derives from the module's own and has its names, so that isinstance, hooks, state_dict, optimisers, repr and
libraries that note a class by name notice nothing. Undoing it gives the class back.
"""

import functools
import inspect
from typing import Any

from torch import nn


class Fast:
    """Base of the forwards that `accelerate` gives; a class made of one knows the `original` class and its `options`."""

    original: type[nn.Module]
    kind: "type[Fast]"
    options: tuple

    @classmethod
    def members(cls, base: type[nn.Module], *options) -> dict:
        """What the class for `base` has besides this one's methods."""
        return {}

    def __reduce_ex__(self, protocol):
        # Classes made at run time cannot be pickled by name; what they were made of can.
        state: Any = super().__reduce_ex__(max(int(protocol), 2))[2:]
        return _new, (self.original, self.kind, *self.options), *state


def _new(base: Any, kind: Any, *options) -> nn.Module:
    return object.__new__(fast_class(base, kind, *options))


def fast_class(base: Any, kind: Any, *options) -> type[nn.Module]:
    """`base` with the methods of `kind` before its own."""
    return _made(base, kind, options, inspect.getattr_static(base, "forward"))


@functools.cache
def _made(base: Any, kind: Any, options: tuple, _forward: Any) -> type[nn.Module]:
    """One class for as long as base keeps its forward: others patch classes too."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    own = names | {"original": base, "kind": kind, "options": options}
    return type(base.__name__, (kind, base), own | kind.members(base, *options))


def swap(module: nn.Module, kind: Any, *options) -> None:
    own: Any = type(module)
    module.__class__ = fast_class(own, kind, *options)


def unswap(module: nn.Module) -> bool:
    """Give the module its own class back; False if it has it."""
    if not isinstance(module, Fast):
        return False
    module.__class__ = module.original  # type: ignore[assignment]
    return True


def plain(module: nn.Module) -> bool:
    """No hook would notice that the module is not called by itself, and no instance attribute hides its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__

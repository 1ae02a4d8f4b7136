"""Tensors made of a module's parameters (packed weights, joined projections), kept until a parameter changes."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of each parameter that are compared at every use


class _Source(NamedTuple):
    """A parameter as it was: holding its memory keeps the address from being given to another."""

    held: Tensor
    version: int
    sample: Tensor


class _Kept(NamedTuple):
    sources: tuple[_Source, ...]
    made: Tensor


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _sample(t: Tensor) -> Tensor:
    """SAMPLES elements spread over the memory of t, as bits: NaN equals itself."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    step = max(1, extent // SAMPLES)
    picked = t.detach().as_strided(((extent - 1) // step + 1,), (step,))
    return picked.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _unchanged(t: Tensor, was: _Source) -> bool:
    held = was.held
    return (
        t.data_ptr() == held.data_ptr()
        and t._version == was.version
        and t.dtype == held.dtype
        and t.shape == held.shape
        and t.stride() == held.stride()
        and torch.equal(_sample(t), was.sample)  # `p.data.mul_()` (old optimisers, averages) leaves the version alone
    )


def cacheable(*parameters: Tensor) -> bool:
    """Ordinary dense tensors with a version: no subclass, no inference tensor."""
    return all(type(p) in (nn.Parameter, Tensor) and p.numel() and not p.is_inference() for p in parameters)


def derived(module: nn.Module, parameters: tuple[Tensor, ...], make: Callable[..., Tensor]) -> Tensor:
    """make(*parameters), made again when a parameter is another tensor or has other values.

    Seen are: another tensor or `.data`, `.to()`, `load_state_dict`, every in-place change that autograd counts, and a change
    behind its back (`p.data.mul_()`) that touches one of SAMPLES elements spread over the parameter.
    """
    kept = _KEPT.get(module)
    if kept and len(kept.sources) == len(parameters) and all(map(_unchanged, parameters, kept.sources)):
        return kept.made
    sources = tuple(_Source(p.detach(), p._version, _sample(p).clone()) for p in parameters)
    with torch.no_grad():
        made = make(*(p.detach() for p in parameters))
    _KEPT[module] = _Kept(sources, made)
    return made


def forget(module: nn.Module) -> None:
    _KEPT.pop(module, None)

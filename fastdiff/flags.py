"""Settings that sampling changes for a while and that are not a thread's own: train or eval mode, TF32, cuDNN's choices.

Threads that sample at once share them: the first one in changes them, the last one out sets them back.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from fastdiff.modules import modules_of

_lock = threading.Lock()
_modules: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()  # users, mode before them
_exact: list[tuple[bool, ...]] = []  # TF32 of convolutions and products before each one that is in
_autotuned: list[tuple[bool, ...]] = []  # and whether cuDNN measured


@contextlib.contextmanager
def evaluating(*networks: object) -> Iterator[None]:
    """Every submodule in eval mode, and back to what it was; no matter for what is no module."""
    everything = [m for network in networks if isinstance(network, nn.Module) for m in modules_of(network)]
    with _lock:
        # one that is in eval mode, and not by another thread's wish, stays as it is
        modules = [m for m in everything if m.training or m in _modules]
        for m in modules:
            users, before = _modules.get(m, (0, m.training))
            _modules[m] = users + 1, before
            m.training = False
    try:
        yield
    finally:
        with _lock:
            for m in modules:
                users, before = _modules.pop(m)
                if users > 1:
                    _modules[m] = users - 1, before
                else:
                    m.training = before


@contextlib.contextmanager
def exact(quality: str) -> Iterator[None]:
    """Without TF32 where the images are to be lossless."""
    if quality != "lossless":
        yield
        return
    with _held(_exact, _tf32, _set_tf32, (False, False)):
        yield


@contextlib.contextmanager
def autotuned() -> Iterator[None]:
    """cuDNN measures its algorithms at every shape that it has not seen, and takes what was fastest from then on."""

    def put(measures: bool) -> None:
        torch.backends.cudnn.benchmark = measures

    with _held(_autotuned, lambda: (torch.backends.cudnn.benchmark,), put, (True,)):
        yield


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def _set_tf32(convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@contextlib.contextmanager
def _held(before: list, get: Callable[[], tuple], put: Callable[..., None], wanted: tuple) -> Iterator[None]:
    """`wanted` while anybody is in; then what it was before the first."""
    with _lock:
        before.append(before[0] if before else get())
        put(*wanted)
    try:
        yield
    finally:
        with _lock:
            first = before.pop()
            if not before:
                put(*first)

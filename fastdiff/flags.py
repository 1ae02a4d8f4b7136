"""Settings that sampling changes for a while and that are not a thread's own: train or eval mode, TF32.

Threads that sample at once share them: the first one in changes them, the last one out sets them back.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from fastdiff.modules import modules_of

_lock = threading.Lock()
_modules: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()  # users, mode before them
_exact: list[tuple[bool, bool]] = []  # TF32 of convolutions and products before each one that is in


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
    with _lock:
        now = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        _exact.append(_exact[0] if _exact else now)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        with _lock:
            before = _exact.pop()
            if not _exact:
                torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

"""Models of networks that somebody else holds in memory: read once, not at every call of `sample`."""

import threading
import weakref
from typing import Any

import torch

from fastdiff.compile.fits import Fingerprint
from fastdiff.model import Model, load

_held: weakref.WeakKeyDictionary[Any, tuple[str, Fingerprint, Model]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def read(source: Any, device: torch.device) -> Model:
    """`load(source, device)`, the same Model as before where source is an object whose weights and settings have not changed.

    A diffusers pipeline's model, and the programs made for it, live as long as the pipeline. Files are read anew.
    """
    network = getattr(source, "unet", source)
    if not isinstance(network, torch.nn.Module):
        return load(source, device)
    scheduler = getattr(source, "scheduler", None)
    configs = getattr(network, "config", None), getattr(scheduler, "config", None)
    settings = repr((id(network), type(scheduler), configs, str(device)))
    with _lock:
        known, fingerprint, model = _held.get(source, (None, None, None))
        if model is not None and known == settings and fingerprint is not None and fingerprint.holds(network):
            return model
    model = load(source, device)
    with _lock:
        _held[source] = settings, Fingerprint(network), model
    return model

"""What was fastest on this machine, layer size by layer size: measured once, then known to every process of the user.

One small JSON file in the cache folder (`fastdiff.cache`) for each machine, GPU, type, batch and number of threads. A file
that is damaged, of another build or not to be written is as good as none: its layers are measured.
"""

import functools
import hashlib
import importlib.util
import json
import os
import platform
import threading
from pathlib import Path

import torch

from fastdiff import cache, ops
from fastdiff.atomic import atomically, remove_leftovers
from fastdiff.version import __version__

LARGEST = 2**20  # bytes of a file that is read: some 20,000 layer sizes

_tables: dict[str, "Choices"] = {}
_lock = threading.RLock()


class Choices:
    """Layer -> algorithm, for one description of where and for what it was measured."""

    def __init__(self, about: dict[str, str | int]):
        self.about, self.known, self.fresh = about, dict[str, str](), False
        self.refused: set[str] = set()  # layers whose algorithm in the file cannot be had
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.name = f"choices-{about['fastdiff']}-{about['dtype']}-b{about['batch']}-t{about['threads']}-{digest}.json"

    def read(self) -> None:
        """Take what the file knows and this process does not: a choice once made here stays."""
        folder = cache.folder()
        self.known = ({} if folder is None else _parsed(folder / self.name, self.about)) | self.known

    def find(self, layer: str) -> str | None:
        return self.known.get(layer)

    def add(self, layer: str, algorithm: str) -> None:
        with _lock:
            if layer in self.known:
                self.refused.add(layer)
            self.known[layer], self.fresh = algorithm, True

    def write(self) -> None:
        """To the file, with what other processes have put there; where that cannot be, the process alone knows."""
        folder = cache.folder()
        if not self.fresh or folder is None:
            return
        with _lock:
            self.fresh = False
            theirs = {k: v for k, v in _parsed(folder / self.name, self.about).items() if k not in self.refused}
            text = json.dumps({"about": self.about, "choices": self.known | theirs}, indent=1)
        try:
            remove_leftovers(folder)
            atomically(folder / self.name, lambda temporary: _put(temporary, text + "\n"))
        except OSError:
            return


def _put(path: str, text: str) -> None:
    Path(path).write_text(text)


def _parsed(path: Path, about: dict[str, str | int]) -> dict[str, str]:
    """What the file holds for `about`; nothing where it is absent, damaged or another's."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    choices = found.get("choices") if isinstance(found, dict) and found.get("about") == about else None
    if not isinstance(choices, dict):
        return {}
    return {layer: name for layer, name in choices.items() if isinstance(name, str)}


def choices(dtype: torch.dtype, batch: int, device: torch.device | None = None) -> Choices:
    """What is known for programs of this type on this device, measured at this batch, with this many threads."""
    about: dict[str, str | int] = {
        "fastdiff": __version__,
        "torch": str(torch.__version__),
        "native": ops.native(),
        "build": _build(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
    }
    if device is not None and device.type == "cuda":
        about["gpu"] = gpu(device)
    key = json.dumps(about)
    with _lock:
        if key not in _tables:
            _tables[key] = Choices(about)
            _tables[key].read()
        return _tables[key]


def forget() -> None:
    """What this process knows; the files stay."""
    with _lock:
        _tables.clear()


@functools.cache
def _build() -> str:
    """A digest of the native code, so that another build is measured anew."""
    try:
        from fastdiff import _C

        return hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:16]
    except (ImportError, OSError):
        return ""


def gpu(device: torch.device) -> str:
    """The GPU, the libraries that PyTorch brings for it, and our kernels."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name(device)}, {capability}, {libraries}, kernels {_kernels()}"


@functools.cache
def _kernels() -> str:
    """A digest of the Triton kernels, which `_build` does not hold; they are not imported."""
    found = importlib.util.find_spec("fastdiff.kernels")
    folders = [] if found is None else found.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """Name and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"

"""Weights in a file that is mapped: the system may drop their pages when memory is short, and read them again.

The file is nameless (unlinked as soon as it is open) in the cache folder, and its space is free again when the weights are
no longer used, however the process ends. Where there is no such folder, no room or only memory behind it, weights stay in
memory.
"""

import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastdiff import cache, checkpoints
from fastdiff.unet import UNet

SMALL = 2**25  # bytes of weights that are not worth a file
RESERVE = 2**30  # bytes of the disk that are left free


class Spill:
    """One such file for one network's program: `put` moves weights there."""

    def __init__(self, network: UNet):
        self.size, self.mapped = 0, list[mmap.mmap]()
        weights = list(network.parameters())
        large = sum(p.nbytes for p in weights) >= SMALL and weights[0].device.type == "cpu"
        self.folder = cache.folder() if large else None
        if self.folder is not None and _in_memory(self.folder):
            self.folder = None
        self.file: BinaryIO | None = None
        self.full = False

    def put(self, t: Tensor) -> Tensor:
        """The same values where the file is mapped, or t itself. What is written to them later stays in memory."""
        if self.folder is None or self.full or not t.numel():
            return t
        start = -(-self.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            free = shutil.disk_usage(self.folder).free
            if free - t.nbytes < RESERVE:
                raise OSError(f"{free / 2**20:,.0f} MB are free, of which {RESERVE / 2**20:,.0f} are left alone")
            self.file = self.file or tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            _write(self.file, start, t)
            area = mmap.mmap(self.file.fileno(), t.nbytes, mmap.MAP_PRIVATE, offset=start)
        except OSError as error:
            warnings.warn(
                f"compile: weights stay in memory after {self.size / 2**20:,.0f} MB in a file in {self.folder} ({error}); "
                f"{cache.VARIABLE} names another folder, and off writes none",
                stacklevel=2,
            )
            self.full = True
            return t
        self.mapped.append(area)
        self.size = start + t.nbytes
        return torch.frombuffer(area, dtype=t.dtype).view(t.shape)

    def network(self, network: UNet) -> UNet:
        """The network with its weights in the file, or the network itself."""
        if self.folder is None:
            return network
        copy = checkpoints.build(network.config)
        copy.load_state_dict({name: self.put(t.detach()) for name, t in network.state_dict().items()}, assign=True)
        for p, q in zip(copy.parameters(), network.parameters(), strict=True):
            p.requires_grad_(q.requires_grad)
        return copy.train(network.training)

    def finish(self) -> str:
        """Give back the memory of what was only read to make the program; what is where, in words."""
        give_back(self.mapped)
        trim()
        self.mapped = []
        if self.file is None:
            return ""
        self.file.close()
        return (
            f"{self.size / 2**20:,.0f} MB of weights are mapped from a nameless file in {self.folder}" if self.size else ""
        )


def _write(file: BinaryIO, start: int, t: Tensor) -> None:
    """All of t's bytes at `start`; OSError where the disk is full."""
    left = memoryview(t.contiguous().flatten().view(torch.uint8).numpy().data)
    while left:
        written = os.pwrite(file.fileno(), left, start)
        left, start = left[written:], start + written


def give_back(areas: Iterable[mmap.mmap]) -> None:
    """Unmap what was read so far: it is read again where it is needed. What somebody wrote there would be lost."""
    for area in areas:
        if hasattr(mmap, "MADV_DONTNEED"):
            area.madvise(mmap.MADV_DONTNEED)


def trim() -> None:
    """Give back what the C library keeps of memory that was freed: trials and packing leave it full of holes."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _in_memory(folder: Path) -> bool:
    """Whether the folder's files are memory themselves."""
    try:
        device = os.stat(folder).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo") as file:
            found = [line.split() for line in file]
    except OSError:
        return False
    return any(words[2] == number and words[words.index("-") + 1] in ("tmpfs", "ramfs") for words in found)

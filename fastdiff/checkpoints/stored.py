"""Tensors that are still in their file, and the reader of .safetensors files."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.errors import CheckpointError

HEADER = 8 << 20  # bytes of the largest .safetensors header read: 80,000 tensors' names
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored:
    """A tensor of known shape and type whose bytes are read when they are needed.

    `load(offset, count)` gives `count` bytes from `offset` of its storage as a uint8 tensor. offset, shape and stride
    count elements; more elements than the storage's `size` are refused, so that no file claims more than it holds.
    """

    def __init__(self, load: Callable[[int, int], Tensor], dtype: torch.dtype, size: int, offset: int, shape, stride=None):
        numbers = (size, offset, *shape, *(stride or ()))
        if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) > 8:
            raise CheckpointError(f"a tensor of shape {str(shape)[:80]} at {str(offset)[:30]} is not valid")
        if stride is None:
            stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
        if offset + span > size or math.prod(shape) > size:
            raise CheckpointError(f"a tensor of shape {list(shape)} does not fit its {size} stored values")
        self.load, self.dtype, self.offset, self.span = load, dtype, offset, span
        self.shape, self.stride = torch.Size(shape), tuple(stride)

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        width = self.dtype.itemsize
        if not self.span:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = self.load(self.offset * width, self.span * width)
        return flat.view(self.dtype).as_strided(self.shape, self.stride)


Weight = Tensor | Stored


def from_file(path: Path, start: int) -> Callable[[int, int], Tensor]:
    """Reads bytes of the file from `start` on."""

    def load(offset: int, count: int) -> Tensor:
        buffer = torch.empty(count, dtype=torch.uint8)
        with open(path, "rb") as file:
            file.seek(start + offset)
            if file.readinto(buffer.numpy().data) != count:
                raise CheckpointError(f"model: {path} is truncated; copy it again")
        return buffer

    return load


def safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file: 8 bytes length, JSON header, data.

    Raises: CheckpointError where header and file do not agree; nothing beyond the header is read.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"model: {path} is truncated or not a .safetensors file ({what}); copy it again or give another file"
        )

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise refuse(f"its header claims {length} bytes of {max(size - 8, 0)}")
        if length > HEADER:
            raise refuse(f"its header of {length} bytes is larger than the {HEADER} read here")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is no JSON: {str(error)[:100]}") from error
    if not isinstance(header, dict):
        raise refuse("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        try:
            first, last = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            count = math.prod(shape)
            if not (
                type(first) is type(last) is int
                and 0 <= first <= last <= size - 8 - length
                and (last - first) == count * dtype.itemsize
            ):
                raise ValueError(f"bytes {first} to {last} for {shape} of {entry['dtype']}")
            tensors[name] = Stored(from_file(path, 8 + length + first), dtype, count, 0, shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise refuse(f"the entry of {name[:100]!r} is wrong: {type(error).__name__} {str(error)[:100]}") from error
    return tensors, metadata if isinstance(metadata, dict) else {}

"""A compiled program in a file: the model's own .safetensors file with the packed weights and the choices beside it.

Packed weights come first and are aligned, so that a program reads them where the file is mapped: a process that loads one
copies nothing, and several share the memory.
"""

import json
import mmap
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import checkpoints, ops
from fastdiff.atomic import atomically
from fastdiff.checkpoints.stored import DTYPES, safetensors
from fastdiff.compile import Compiled, program_of
from fastdiff.compile.choose import eight_bits
from fastdiff.compile.fits import obstacle
from fastdiff.compile.measured import gpu
from fastdiff.compile.spill import give_back
from fastdiff.model import READERS, Model
from fastdiff.ops._winograd import PACKING
from fastdiff.request import QUALITIES, check_quality
from fastdiff.unet import UNetConfig
from fastdiff.version import __version__

ALIGNMENT = 64  # bytes
PACKED = "packed."
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def machine(device: torch.device) -> dict[str, str | int]:
    """What packing and choices depend on."""
    known: dict[str, str | int] = {"fastdiff": __version__, "native": ops.native().partition(" (")[0], "packing": PACKING}
    return known if device.type != "cuda" else known | {"gpu": gpu(device)}


def save(model: Compiled, path: str | os.PathLike) -> None:
    """Write the file, all of it or nothing."""
    program = model.program
    packed = {PACKED + s.name: s.packed for s in program.convolutions if s.packed is not None}
    about = {
        "quality": model.quality,
        "size": program.size,
        "algorithms": program.algorithms,
        "attention": program.attention_algorithms,
        "machine": machine(program.device),
        "times": program.conditions.times(),
    }
    description = model.plain._description() | {"info": model.info, "program": about}
    tensors = packed | model.state
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, not item[0].startswith(PACKED)))
    atomically(path, lambda temporary: _write(temporary, ordered, {"fastdiff": json.dumps(description)}))


def _write(path: str, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    """A .safetensors file whose data begins at a multiple of ALIGNMENT; `safetensors` itself orders tensors its own way."""
    tensors, header, at = list(tensors), {"__metadata__": metadata}, 0
    entries: dict[str, Any] = header  # type: ignore[assignment]
    for name, t in tensors:
        entries[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in tensors:
            file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _mapped(path: Path) -> tuple[dict[str, Tensor], mmap.mmap]:
    """Every tensor of the file, where it is mapped: nothing is read before it is used, and nothing written goes back."""
    entries, _ = safetensors(path)  # checks that header and file agree
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        area = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    data = torch.frombuffer(area, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for name, entry in entries.items():
        first, last = header[name]["data_offsets"]
        part = data[first:last]
        part = part.clone() if part.storage_offset() % entry.dtype.itemsize else part  # written by another program
        tensors[name] = part.view(entry.dtype).reshape(tuple(entry.shape))
    return tensors, area


def read(path: Path, description: dict[str, Any], fields: dict[str, Any], device: str | torch.device) -> Model:
    """The compiled model of a file that `save` wrote; `fields` are its `Model`'s.

    Packed weights of another machine or release are not used: the program is made again, which is said.
    """
    about = description["program"]
    check_quality(about["quality"])
    device, dtype, size = torch.device(device), QUALITIES[about["quality"]], tuple(about["size"])
    algorithms = about["algorithms"] | about.get("attention", {})  # older files have none
    state, area = _mapped(path)
    packed = {name.removeprefix(PACKED): state.pop(name) for name in list(state) if name.startswith(PACKED)}
    network = checkpoints.build(UNetConfig(**description["network"]["config"]))
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False).to(device)
    if about["machine"] != machine(device):
        what = "was packed on another machine or release; compiling again"
        warnings.warn(f"model: the program in {path} {what}", stacklevel=4)
        packed, algorithms = {}, None
    packed = {name: t.to(device) for name, t in packed.items()}
    reason = obstacle(network)
    if reason is not None:
        warnings.warn(f"model: the program in {path} cannot run, its network does instead: {reason}", stacklevel=4)
        return Model(network.to(memory_format=torch.channels_last), **fields)  # it runs, and was mapped as in the file
    fast = about["quality"] == "fast" and eight_bits(dtype, device)
    program = program_of(network, dtype, 1, size, algorithms, packed, fast=fast)
    program.tabulate(about["times"])
    give_back([area])  # what packing by the library has read
    return Compiled(program, **fields, original=network, quality=about["quality"])


READERS["program"] = read

"""Pickles, read without running what is in them.

A pickle is a program for a stack machine; what makes it dangerous is that it may call anything Python can import. Here it
may only name what `Reader.find_class` knows: plain containers, the functions that put a tensor together, torch's module
containers and NVlabs' persistence record, all replaced by inert stand-ins of ours. Before it runs, `scan` (opcodes.py) walks
over its opcodes. Tensors stay in the file until they are needed.
"""

import collections
import io
import mmap
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.errors import CheckpointError
from fastdiff.checkpoints.opcodes import scan
from fastdiff.checkpoints.stored import Stored, from_file

MEMBERS = 16 << 20  # bytes of a zip file's list of members
MAGIC = 0x1950A86A20F9469CFC6C  # torch's format before 1.6 begins with it
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMBERS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u8": "Q", "b1": "?"}


class Module:
    """A torch module or a persistent object as it was saved: its class's name and its attributes."""

    def __init__(self, name: str, state: Any = None):
        self.name, self.state = name, state if isinstance(state, dict) else {}

    def init_kwargs(self) -> dict[str, Any]:
        values = self.state.get("_init_kwargs")
        return dict(values) if isinstance(values, dict) else {}

    def weights(self, prefix: str = "", depth: int = 0) -> dict[str, Any]:
        """Its state dict."""
        if depth > 50:
            raise CheckpointError(f"its modules are nested too deeply at {prefix[:100]}")
        found: dict[str, Any] = {}
        for kind in ("_parameters", "_buffers"):
            values = self.state.get(kind)
            if isinstance(values, dict):
                found |= {f"{prefix}{k}": v for k, v in values.items() if isinstance(v, (Stored, Tensor))}
        modules = self.state.get("_modules")
        for name, module in modules.items() if isinstance(modules, dict) else ():
            if isinstance(module, Module):
                found |= module.weights(f"{prefix}{name}.", depth + 1)
        return found


class Reader(pickle.Unpickler):
    """One pickle; `storage(key, dtype, numel)` finds the bytes of a tensor that lie outside it."""

    def __init__(self, file: io.BufferedIOBase, storage: Any = None):
        super().__init__(file, encoding="latin1")
        self.storage = storage
        self.known: dict[tuple[str, str], Any] = self._known()

    def find_class(self, module: str, name: str) -> Any:
        module = {"numpy._core.multiarray": "numpy.core.multiarray"}.get(module, module)
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module.startswith("torch.nn.modules.") and name in ("ModuleDict", "ModuleList", "Sequential"):
            return _stand_in(name)
        raise CheckpointError(
            f"its pickle wants {module[:80]}.{name[:80]}, which is no weight; nothing of it was run. Save the state dict "
            f"with the program that made it, and load that"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self.storage is None or not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise CheckpointError("its pickle refers to something outside it that is no tensor")
        _, dtype, key, _, numel = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(numel) is not int or len(pid) > 6:
            raise CheckpointError("its pickle refers to a tensor in a way that is not known")
        return self.storage(key, dtype, numel)

    def _known(self) -> dict[tuple[str, str], Any]:
        """What a pickle may name, made anew for each: a pickle can set attributes of what it is given."""

        def tensor(storage, offset, size, stride, *rest):
            if not (isinstance(storage, tuple) and isinstance(size, tuple) and isinstance(stride, tuple)):
                raise CheckpointError("its pickle puts a tensor together from something else")
            if len(size) != len(stride):
                raise CheckpointError("its pickle has a tensor with another number of sizes than strides")
            load, dtype, numel = storage
            return Stored(load, dtype, numel, offset, size, stride)

        def parameter(data, *rest):
            return data

        def embedded(blob):
            return legacy_storage(blob)

        def persistent(meta):
            if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
                raise CheckpointError("its pickle has a persistence record without a class name")
            return Module(meta["class_name"], meta.get("state"))

        def dtype(name, *rest):
            return _Number(name)

        def scalar(kind, raw):
            return kind.value(raw) if isinstance(kind, _Number) else None

        def reconstruct(cls, base, state):
            return cls.__new__(cls)

        return {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("builtins", "set"): set,
            ("builtins", "object"): object,
            ("__builtin__", "set"): set,
            ("__builtin__", "object"): object,
            ("dnnlib.util", "EasyDict"): type("EasyDict", (dict,), {"__slots__": ()}),
            ("torch", "Size"): lambda values: tuple(values),
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): parameter,
            ("torch.storage", "_load_from_bytes"): embedded,
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
            ("numpy", "dtype"): dtype,
            ("numpy.core.multiarray", "scalar"): scalar,
            ("copyreg", "_reconstructor"): reconstruct,
        }


class _Number:
    """numpy's dtype of a single number."""

    def __init__(self, name: str):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which little-endian numbers do not need."""

    def value(self, raw: Any) -> Any:
        code = NUMBERS.get(self.name)
        if code is None or not isinstance(raw, (bytes, str)) or len(raw) != struct.calcsize(code):
            raise CheckpointError(f"its pickle has a number of type {str(self.name)[:20]}")
        return struct.unpack("<" + code, raw.encode("latin1") if isinstance(raw, str) else raw)[0]


def _stand_in(name: str) -> Any:
    """A class whose instances only remember what was saved under the name of a torch module."""

    class StandIn(Module):
        def __init__(self):
            super().__init__(name)

        def __new__(cls, *args):
            self = object.__new__(cls)
            Module.__init__(self, name)
            return self

        def __setstate__(self, state):
            self.state = state if isinstance(state, dict) else {}

    return StandIn


def _run(file: io.BufferedIOBase, storage: Any = None) -> Any:
    try:
        return Reader(file, storage).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can make the machine stumble over anything
        raise CheckpointError(f"its pickle is damaged ({type(error).__name__}: {str(error)[:100]})") from error


def legacy_storage(blob: Any) -> tuple:
    """The one storage of a torch stream of before 1.6 that a plain pickle holds as a byte string."""
    if not isinstance(blob, bytes):
        raise CheckpointError("its pickle has a tensor whose data are no bytes")

    def load_from(start: int):
        def load(offset: int, count: int) -> Tensor:
            return torch.frombuffer(bytearray(blob[start + offset : start + offset + count]), dtype=torch.uint8)

        return load

    value = _legacy(blob, load_from)
    if not (isinstance(value, tuple) and len(value) == 3):
        raise CheckpointError("its pickle has a tensor whose data are no storage")
    return value


def _legacy(data: Any, load_from) -> Any:
    """Four pickles (magic number, protocol, system, object), the list of storages, their data one after the other."""
    at, objects = 0, []
    storages: dict[str, list] = {}

    def storage(key, dtype, numel):
        place = storages.setdefault(key, [dtype, numel, None])
        if place[:2] != [dtype, numel] or numel < 0:
            raise CheckpointError(f"its storage {key[:30]} has two types or sizes")

        def load(offset, count):
            return load_from(place[2])(offset, count)

        return load, dtype, numel

    for _ in range(5):
        end = scan(data, at)
        objects.append(_run(io.BytesIO(bytes(data[at:end])), storage))
        at = end
    if objects[0] != MAGIC or not isinstance(objects[4], list):
        raise CheckpointError("it is no torch file")
    for key in objects[4]:
        if key not in storages:
            raise CheckpointError("its list of tensors names one that is not used")
        dtype, numel, _ = storages[key]
        stated = int.from_bytes(data[at : at + 8], "little")
        if stated != numel or at + 8 + numel * dtype.itemsize > len(data):
            raise CheckpointError("it is truncated, or its tensors have other sizes than it says")
        storages[key][2] = at + 8
        at += 8 + numel * dtype.itemsize
    if any(place[2] is None for place in storages.values()):
        raise CheckpointError("its list of tensors lacks one that is used")
    return objects[3]


def read_pickle(path: Path) -> Any:
    """The object in a plain pickle or in a torch file of before 1.6; tensors as `Stored`."""
    with open(path, "rb") as file:
        if not os.path.getsize(path):
            raise CheckpointError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = scan(data)
            if end < 100 and _run(io.BytesIO(data[:end])) == MAGIC:
                return _legacy(data, lambda start: from_file(path, start))
        file.seek(0)
        return _run(file)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The list of members, unless it is larger than any torch file's."""
    with open(path, "rb") as file:
        file.seek(-min(os.path.getsize(path), 22 + 65535), os.SEEK_END)
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    wide = tail.rfind(b"PK\x06\x06", 0, max(end, 0))  # the same with 64-bit numbers
    length = 0
    if end >= 0 and len(tail) >= end + 22:
        length = struct.unpack_from("<I", tail, end + 12)[0]
    if wide >= 0 and len(tail) >= wide + 56:
        length = max(length if length != 0xFFFFFFFF else 0, struct.unpack_from("<Q", tail, wide + 40)[0])
    if length > MEMBERS:
        raise CheckpointError(f"it is a zip file with a list of members of {length} bytes, no torch file's is so long")
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"it is a truncated or damaged zip file ({str(error)[:100]})") from error


def read_zip(path: Path) -> Any:
    """The object in a torch file: data.pkl, and one member data/<key> for each storage, none compressed."""
    members = _members(path)
    size = os.path.getsize(path)
    entries = {}
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.header_offset + member.file_size > size:
            raise CheckpointError(f"its member {member.filename[:80]!r} is compressed or truncated, no torch file is so")
        entries[member.filename] = member
    top = next((name[: -len("data.pkl")] for name in entries if name.endswith("data.pkl")), None)
    if top is None:
        raise CheckpointError("it is a zip file without data.pkl, not a torch file")

    def start(member: zipfile.ZipInfo) -> int:
        with open(path, "rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"its member {member.filename[:80]!r} is damaged")
        return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))

    def bytes_of(name: str) -> bytes:
        return bytes(from_file(path, start(entries[name]))(0, entries[name].file_size).numpy())

    order = f"{top}byteorder"
    if order in entries and entries[order].file_size < 10 and bytes_of(order) != b"little":
        raise CheckpointError("its numbers are big-endian, which is not read")

    def storage(key, dtype, numel):
        member = entries.get(f"{top}data/{key}")
        if member is None or member.file_size != numel * dtype.itemsize:
            raise CheckpointError(f"its tensor data/{key[:30]} is missing or of another size")
        return from_file(path, start(member)), dtype, numel

    main = entries[f"{top}data.pkl"]
    if main.file_size > 64 << 20:
        raise CheckpointError(f"its data.pkl has {main.file_size} bytes, no weights' has")
    pickled = bytes_of(main.filename)
    scan(pickled)
    return _run(io.BytesIO(pickled), storage)

"""Files made to harm: a clear error, nothing executed, little processor time and memory."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import socket
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from writers import edm_pickle

import fastdiff
from fastdiff import CheckpointError

SECONDS = 1.0  # of processor time, so that a busy machine does not count
BYTES = 200 << 20


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def peak() -> int:
    """The largest resident set of this process since `forget_peak`, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10


def refused(path, words):
    """fastdiff.load(path) refuses it with `words`, soon and without much memory."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = peak()
    except OSError:
        before = None  # no such thing on this system: memory is not looked at
    start = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        fastdiff.load(path)
    assert time.process_time() - start < SECONDS
    assert before is None or peak() - before < BYTES
    assert len(str(caught.value)) < 2000 and str(path) in str(caught.value)


@pytest.fixture
def trap(tmp_path):
    """A file that any code that runs would make."""
    path = tmp_path / "trap"
    yield path
    assert not path.exists(), "code in the file was run"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"(posix|nt).system"), (eval, r"builtins.eval"), (exec, "builtins.exec"), (os.open, "open")],
)
def test_pickle_that_calls(function, name, protocol, trap, tmp_path):
    argument = f"touch {trap}" if function is os.system else f"open({str(trap)!r}, 'w')"
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"ema": Calls(function, argument)}, protocol))
    refused(path, rf"its pickle (wants \w*\.?({name}|__builtin__\.\w+|\w+\.\w+), which is no weight; nothing of it was run)")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_file_that_calls(legacy, trap, tmp_path):
    torch.save({"a": Calls(os.system, f"touch {trap}")}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pt", r"its pickle wants (posix|nt).system, which is no weight; nothing of it was run")


OBJECTS = {"socket": socket.SocketKind.SOCK_STREAM, "class": io.StringIO, "object": pathlib.PurePosixPath("a")}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS.keys())
def test_pickle_that_imports(value, tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"ema": value}))
    refused(tmp_path / "m.pkl", r"its pickle wants [\w.]+, which is no weight; nothing of it was run")


def test_pickle_that_changes_what_it_is_given(trap, tmp_path):
    """BUILD sets attributes of objects, functions and classes among them; the next file is read as before."""
    names = [
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.nn.modules.container", "ModuleDict"),
        ("collections", "OrderedDict"),
    ]
    for module, name in names:
        target = b"c" + f"{module}\n{name}\n".encode()
        body = b"\x80\x04" + target + b"N}\x8c\x07weights\x8c\x07nothings\x86b."
        (tmp_path / "m.pkl").write_bytes(body)
        refused(tmp_path / "m.pkl", "is not read")
    torch.save({"linear.weight": torch.ones(2)}, tmp_path / "good.pt")
    refused(tmp_path / "good.pt", "its 1 tensors")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04", "ends in the middle of a pickle"),
        (b"\x80\x04]\x94" + b"\x8e" + struct.pack("<Q", 2**60) + b"x.", "ends in the middle"),
        (b"\x80\x04]r\xff\xff\xff\x7f.", "numbers an object 2147483647"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**45) + b"].", "claims 35184372088832 bytes of the 2 that follow"),
        (b"\x80\x04" + b"]" * 2_000_000 + b".", "more than 600000 operations"),
        (b"\x80\x04" + b"(" * 500_000 + b"t" * 90_000 + b".", "it holds a tuple, not a fastdiff"),
        (b"\x80\x04\x82\x01.", "opcode 0x82"),
        (b"\x80\x04" + b"c" + b"a" * 10_000 + b"\nb\n.", "a name in its pickle does not end"),
        (b"\x80\x04K\x01.", "it holds a int, not a fastdiff"),
        (b"\x80\x04}.", "of another program"),
        (b"\x80\x04)R.", "damaged"),
        (b"", "truncated or not a .safetensors file"),
        (b"\x00" * 100, "truncated or not a .safetensors file"),
        (b"PK\x03\x04" + b"\x00" * 100, "truncated or damaged zip file"),
    ],
    ids=range(14),
)
def test_broken_bytes(data, words, tmp_path):
    (tmp_path / "m").write_bytes(data)
    refused(tmp_path / "m", words)


def test_pickle_with_ten_million_entries(tmp_path):
    entries = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10_000))
    with open(tmp_path / "m.pkl", "wb") as file:
        file.write(b"\x80\x04}")
        for _ in range(1000):
            file.write(b"(" + entries + b"u")
        file.write(b".")
    refused(tmp_path / "m.pkl", "more than 600000 operations")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.write(tmp_path / "m.pkl", "m/data.pkl")
    refused(tmp_path / "m.pt", "its data.pkl has [0-9]+ bytes|more than 600000 operations")


def test_safetensors_headers(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (2**60, 2**63, 2**64 - 1, 100):
        path.write_bytes(struct.pack("<Q", length) + b'{"a"')
        refused(path, rf"its header claims {length} bytes of 4")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for change in (
        {"shape": [2**60]},
        {"shape": [-2, -1]},
        {"shape": ["2"]},
        {"shape": 2},
        {"shape": [[2]]},
        {"dtype": "F31"},
        {"dtype": ["F32"]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": "08"},
        {"data_offsets": None},
    ):
        header = json.dumps({"a": entry | change}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        refused(path, "is truncated or not a .safetensors file|is not valid|does not fit|is damaged")
    for header in (b"[" * 100_000, b"null", b"{\xff}", b'{"a": 1e999}', b'{"a": ' + b"9" * 10_000 + b"}"):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        refused(path, "is truncated or not a .safetensors file|is damaged")
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(2 << 30)
    refused(path, "its header of 1073741824 bytes is larger")


def test_truncated_zip(tmp_path):
    torch.save({"input_blocks.0.0.weight": torch.randn(1000)}, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    for keep in (5, 100, len(data) // 2, len(data) - 10):
        (tmp_path / "m.pt").write_bytes(data[:keep])
        refused(tmp_path / "m.pt", "truncated or damaged zip file|truncated or not")


def test_zip_bombs(tmp_path):
    """Compressed members, and a list of members longer than any torch file's."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(50 << 20))
    refused(tmp_path / "m.pt", "compressed or truncated")
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**31, 4, 0)
    with open(tmp_path / "m.pt", "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**31 + 4)
        file.seek(0, os.SEEK_END)
        file.write(end)
    refused(tmp_path / "m.pt", "list of members of 2147483648 bytes")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (2**60,), (0,)),
        (0, (2**20, 2**20), (0, 0)),
        (0, (5,), (1,)),
        (4, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2, 2), (1,)),
        (0, (1.0,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (2**70, (1,), (1,)),
    ],
)
def test_tensors_beyond_their_storage(offset, size, stride, tmp_path):
    """Views that claim more than is stored, also by repeating it, are not made."""

    class View:
        def __reduce__(self):
            storage = torch.ones(4).untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, {})

    torch.save({"input_blocks.0.0.weight": View()}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "a tensor of shape|a tensor with another number of sizes")


def test_hostile_arguments(case, tmp_path):
    """An EDM pickle whose arguments ask for endless networks, or are of another type."""
    data = case("edm_adm_cond")
    changes = [
        {"num_blocks": 10**9},
        {"model_channels": 2**40},
        {"channel_mult": [1] * 10**5},
        {"channel_mult": "ab"},
        {"img_resolution": 7},
        {"img_resolution": "x"},
        {"attn_resolutions": 3},
        {"label_dim": 2**62},
        {"dropout": "much"},
    ]
    for change in changes:
        edm_pickle(tmp_path / "m.pkl", dataclasses.replace(data, constructor=data.constructor | change))
        refused(tmp_path / "m.pkl", "model: the arguments in .* are inconsistent|do not fit the network|is not read")


def test_modules_in_a_circle(tmp_path):
    """A module that contains itself."""
    record = b"\x80\x04ctorch.nn.modules.container\nModuleDict\n)\x81\x94}\x8c\x08_modules}\x8c\x01ah\x00sss"
    (tmp_path / "m.pkl").write_bytes(record + b"b.")
    refused(tmp_path / "m.pkl", "is not read|damaged")


def test_folder_with_hostile_configuration(tmp_path):
    (tmp_path / "m").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    for text in (
        "",
        "[1]",
        "[" * 10**5,
        '{"_class_name": 3}',
        '{"sample_size": 8, "block_out_channels": null}',
        "{" + " " * (2 << 20),
    ):
        (tmp_path / "m" / "config.json").write_text(text)
        refused(tmp_path / "m", "model: ")

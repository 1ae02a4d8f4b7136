"""Files made to harm, each read in a process of its own: the error, its processor time, its peak memory, what was attempted.

A process with fastdiff loaded forks for every file, so that neither memory freed before nor imports blur the numbers, and an
audit hook of Python's notes each attempt to run a program, open a socket or execute code.
"""

import dataclasses
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from writers import diffusers_folder, edm_pickle

SECONDS, BYTES = 1.0, 200 << 20
CHILD = """
import json, os, sys, time
import fastdiff

ATTEMPTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.putenv", "subprocess.Popen", "socket.", "ctypes.dlopen")

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) << 10

def read(path):
    attempts = []
    sys.addaudithook(lambda event, args: attempts.append(event) if event.startswith(ATTEMPTS) else None)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, start = status("VmRSS"), time.process_time()
    try:
        fastdiff.load(path)
        error = ["none", ""]
    except BaseException as caught:
        error = [type(caught).__name__, str(caught)]
    return {"error": error, "seconds": time.process_time() - start, "bytes": status("VmHWM") - before, "attempts": attempts}

for path in sys.argv[1:]:
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(start, json.dumps(read(path)).encode())
        os._exit(0)
    os.close(start)
    with open(end, "rb") as pipe:
        print(pipe.read().decode() or json.dumps({"error": ["crash", ""], "seconds": 0, "bytes": 0, "attempts": []}))
    os.waitpid(child, 0)
"""


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def _pickles(folder: Path, trap: Path) -> dict[str, str]:
    import importlib

    calls = {
        "os.system": (os.system, f"touch {trap}"),
        "exec": (exec, f"open({str(trap)!r}, 'w')"),
        "socket": (socket.create_connection, ("127.0.0.1", 9)),
        "import": (importlib.import_module, "antigravity"),
        "popen": (subprocess.Popen, ["touch", str(trap)]),
    }
    for name, (function, argument) in calls.items():
        (folder / name).write_bytes(pickle.dumps({"ema": Calls(function, argument)}))
        torch.save({"w": Calls(function, argument)}, folder / f"{name} zip")
    return {f"{name}{zipped}": "which is no weight; nothing of it was run" for name in calls for zipped in ("", " zip")}


def _dictionary(path: Path) -> None:
    """A pickled dict of ten million entries."""
    entries = b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(10_000))
    with open(path, "wb") as file:
        file.write(b"\x80\x04}")
        for _ in range(1000):
            file.write(b"(" + entries + b"u")
        file.write(b".")


def _weights(folder: Path, case) -> dict[str, str]:
    """Weights that do not fit their network."""
    plain, edm = case("diffusers_unet2d_ddpm"), case("edm_adm_cond")
    shapes = plain.weights | {"conv_in.bias": torch.ones(5), "conv_out.weight": torch.ones(3, 3)}
    diffusers_folder(folder / "shapes", dataclasses.replace(plain, weights=shapes))
    keys = {k: v for k, v in plain.weights.items() if not k.startswith("conv_in")} | {"extra.a": torch.ones(1)}
    diffusers_folder(folder / "keys", dataclasses.replace(plain, weights=keys))
    edm_pickle(folder / "endless", dataclasses.replace(edm, constructor=edm.constructor | {"num_blocks": 10**9}))
    return {
        "shapes": "2 of another shape: conv_in.bias [5] where [16] belongs, conv_out.weight",
        "keys": "2 missing: conv_in.weight, conv_in.bias; 1 unexpected: extra.a",
        "endless": "are inconsistent",
    }


def _files(folder: Path, trap: Path, case) -> dict[str, str]:
    """Name of a file -> words of its error."""
    words = _pickles(folder, trap) | _weights(folder, case)
    _dictionary(folder / "dictionary")
    torch.save({"input_blocks.0.0.weight": torch.randn(1000)}, folder / "truncated")
    (folder / "truncated").write_bytes((folder / "truncated").read_bytes()[:3000])
    (folder / "header").write_bytes(struct.pack("<Q", 2**60) + b'{"a"')
    entry = {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}
    header = json.dumps({f"down_blocks.{i}": entry for i in range(1000)}).encode()
    (folder / "claims").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "empty members").write_bytes(
        b"PK\x03\x04" + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**31, 4, 0)
    )
    return words | {
        "dictionary": "more than 600000 operations",
        "truncated": "truncated or damaged zip file",
        "header": f"its header claims {2**60} bytes of 4",
        "claims": "is truncated or not a .safetensors file",
        "empty members": "list of members of 2147483648 bytes",
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
def test_each_in_its_own_process(case, tmp_path):
    folder, trap = tmp_path / "files", tmp_path / "trap"
    folder.mkdir()
    words = _files(folder, trap, case)
    command = [sys.executable, "-c", CHILD, *(str(folder / name) for name in words)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(output) == len(words)
    for (name, expected), line in zip(words.items(), output, strict=True):
        got = json.loads(line)
        assert got["error"][0] == "CheckpointError" and expected in got["error"][1], (name, got)
        assert got["attempts"] == [] and got["seconds"] < SECONDS and got["bytes"] < BYTES, (name, got)
        assert str(folder / name) in got["error"][1] and len(got["error"][1]) < 2000
        print(f"{name}: {got['seconds']:.3f} s, {got['bytes'] / 2**20:.0f} MB")
    assert not trap.exists()

"""Mutated checkpoints: whatever the bytes, fastdiff.load gives a model or a CheckpointError.

Two thousand in CI; FASTDIFF_FUZZ=1000000 sets another number, and --hypothesis-seed=1 other ones.
"""

import json
import os
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from writers import Persistent, persistence

import fastdiff
from fastdiff import CheckpointError, UNet, UNetConfig
from fastdiff.checkpoints import files
from fastdiff.checkpoints.stored import Stored

EXAMPLES = int(os.environ.get("FASTDIFF_FUZZ", "2000"))
STATE = {"input_blocks.0.0.weight": torch.arange(6.0).reshape(2, 3), "out.2.bias": torch.ones(1, dtype=torch.float16)}
TINY = {"resolution": 2, "channels": 2, "multipliers": (1,), "blocks": 1, "attention": (), "groups": 1, "in_channels": 1}


def _write(kind, path):
    if kind == "zip":
        torch.save(STATE, path)
    elif kind == "legacy":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(STATE, path)
    elif kind == "pickle":
        with persistence(), open(path, "wb") as file:
            net = Persistent(
                "EDMPrecond", {"_parameters": dict(STATE), "_init_kwargs": {"img_resolution": 2}, "_modules": {}}
            )
            pickle.dump({"ema": net}, file)
    elif kind == "folder":  # its config.json; the weights lie beside it
        path.write_text(json.dumps(FOLDER))
    else:
        model = fastdiff.wrap(
            UNet(UNetConfig(**TINY)), schedule=fastdiff.schedules.EDM(), prediction="edm", precondition=True
        )
        model.save(path)


FOLDER = {
    "_class_name": "UNet2DModel",
    "sample_size": 4,
    "block_out_channels": [2, 4],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
KINDS = ["zip", "legacy", "safetensors", "pickle", "folder", "ours"]
EDIT = st.tuples(
    st.sampled_from(["set", "insert", "cut", "repeat", "end"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
)


def mutate(data: bytes, edits) -> bytes:
    for what, where, piece in edits:
        at = int(where * len(data))
        data = {
            "set": data[:at] + piece + data[at + len(piece) :],
            "insert": data[:at] + piece + data[at:],
            "cut": data[:at] + data[at + 8 * len(piece) :],
            "repeat": data[: at + 8] + data[at:],
            "end": data[:at],
        }[what]
    return data


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for kind in KINDS:
        _write(kind, folder / kind)
    return {kind: (folder / kind).read_bytes() for kind in KINDS}


def _place(folder, kind: str, data: bytes):
    """The bytes where `fastdiff.load` finds them, and what it takes."""
    path = folder / ("config.json" if kind == "folder" else "mutated")
    path.write_bytes(data)
    if kind == "folder" and not (weights := folder / "diffusion_pytorch_model.safetensors").exists():
        save_file(STATE, weights)
    return folder if kind == "folder" else path


@pytest.mark.parametrize("kind", KINDS)
def test_originals_are_read(originals, kind, tmp_path):
    """What is mutated below is valid as it is."""
    found = files.read(_place(tmp_path, kind, originals[kind]), {})
    for value in found.state.values():
        assert isinstance(value, Stored) and torch.isfinite(value.read()).all()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="FASTDIFF_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(kind=st.sampled_from(KINDS), edits=st.lists(EDIT, min_size=1, max_size=4))
def test_mutated(originals, tmp_path_factory, kind, edits):
    path = _place(tmp_path_factory.getbasetemp(), kind, mutate(originals[kind], edits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = files.read(path, {})
            for value in found.state.values():
                value.read()
            fastdiff.load(path)
        except CheckpointError:
            pass

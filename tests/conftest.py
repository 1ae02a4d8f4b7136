"""Before any test module is read: some import Triton, and whether it interprets is settled when a kernel is decorated.

And what several folders of tests share.
"""

import os
import sys
import zlib

import interpreter  # noqa: F401
import pytest
import torch
from tiny import tiny

import fastdiff
from fastdiff import cli
from fastdiff.model import Model


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache is neither read nor written, by tests and by what they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded(request):
    """A test draws the same numbers alone, in any order and in any process; FASTDIFF_TEST_SEED draws others."""
    text = os.environ.get("FASTDIFF_TEST_SEED", "") + request.node.nodeid
    torch.manual_seed(zlib.crc32(text.encode()))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small class-conditional network with random weights, those that start at 0 included."""
    torch.manual_seed(0)
    network = fastdiff.UNet(tiny(labels=10))
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    Model(network, fastdiff.schedules.EDM(), fastdiff.Prediction("edm"), shape=(1, 8, 8), labels=10).save(path)
    return path


@pytest.fixture
def fastdiff_command(monkeypatch, capsys, tmp_path):
    """fastdiff_command("sample", ...) -> (exit status, stdout, stderr), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call

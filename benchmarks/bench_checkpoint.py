"""fastdiff.load of ADM for ImageNet-64, 295.9 M weights, against reading its file into memory."""

import shutil
import sys
import warnings
from pathlib import Path

import harness
import pytest

import fastdiff

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "checkpoints"))
import full_size


@pytest.mark.parametrize("kind", harness.with_full(full_size.FORMATS, ["openai zip", "edm pickle"]))
def test_load(compare, kind, missing, tmp_path):
    if "diffusers" in kind and (why := missing("diffusers")) is not None:
        pytest.skip(why)
    path, hints = full_size.write(kind, tmp_path)
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the order of q, k and v
            return fastdiff.load(path, **hints)

    def check():
        assert 295.8e6 < sum(p.numel() for p in load().network.parameters()) < 296e6

    variants = {"fastdiff": load, "reading": lambda: [p.read_bytes() for p in files]}
    compare("load", f"ADM, {kind}", variants, check, moved=sum(p.stat().st_size for p in files))
    shutil.rmtree(tmp_path)

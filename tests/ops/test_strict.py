"""FASTDIFF_STRICT=1: an op without a kernel raises; without it, the plain-torch reference serves. Every op, no extension."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import ops
from fastdiff.ops import _register

PROGRAM = """
import json, os, sys
sys.modules["fastdiff._C"] = None  # as FASTDIFF_BUILD=none leaves it
sys.path.insert(0, sys.argv[1])
import torch
from bench_launch import CASES
from fastdiff import ops
from fastdiff.ops import _register

told = {}
for op in ops.implementations():
    if op not in CASES:
        continue
    call = CASES[op]("cpu")[0]
    for strict in ("0", "1"):
        os.environ["FASTDIFF_STRICT"] = strict
        try:
            with torch.inference_mode():
                call()
            told[op, strict] = ""
        except RuntimeError as error:
            told[op, strict] = str(error)
print(json.dumps([[*key, text] for key, text in told.items()]))
"""


@pytest.fixture(scope="module")
def told():
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", PROGRAM, benchmarks], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return {(op, strict): text for op, strict, text in json.loads(run.stdout)}


def with_a_reference_of_their_own():
    """What is composed of other ops is refused by those."""
    return [op for op in ops.implementations() if callable(getattr(ops, op, None)) and op not in _register._COMPOSED]


@pytest.mark.parametrize("op", with_a_reference_of_their_own())
def test_no_op_is_served_silently(told, op):
    assert told[op, "0"] == "", "the reference serves"
    assert f"fastdiff::{op} has no cpu kernel here and FASTDIFF_STRICT=1 forbids its plain-torch reference" in told[op, "1"]
    assert "`fastdiff info` says why" in told[op, "1"] and "Unset FASTDIFF_STRICT" in told[op, "1"]

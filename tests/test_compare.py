"""benchmarks/compare.py: its rows and their ratios; the whole of it on the smallest network where -m slow is given."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import pytest
from engines import torch_compile

SCRIPT = Path(compare.__file__)


def test_every_engine_has_a_module():
    for name in compare.NAMES:
        engine, precision = name.rsplit("-", 1)
        assert precision in ("fp32", "bf16")
        assert (SCRIPT.parent / (compare.ENGINES[engine].replace(".", "/") + ".py")).is_file()


def test_table():
    rows = [
        compare.Result("fastdiff-fp32", 10.0, 9.0, 3e-6, 1.0),
        compare.Result("ncnn-fp32", 15.0, 14.0, 4e-6, 1.5),
        compare.Result("mnn-fp32", skipped="not installed: No module named 'MNN'"),
        compare.Result("physicsnemo-fp32", 20.0, 19.0, None, 2.0, note="own weights"),
    ]
    lines = compare.show(rows[::-1]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["fastdiff-fp32", "ncnn-fp32", "physicsnemo-fp32", "mnn-fp32"]
    assert lines[2].split()[1:] == ["15.0", "14.0", "4.0e-06", "1.50"] and lines[3].split()[3] == "-"
    assert lines[3].endswith("2.00  own weights")
    assert lines[4].endswith("skipped: not installed: No module named 'MNN'")


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [compare.Result(f"{e}-{p}", 10.0, 9.0, 1e-6, 1.0) for e in ("fastdiff", "ncnn") for p in ("fp32", "bf16")]
    compare.draw(rows, {"fp32": 12.0, "bf16": 6.0}, "a title", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_autotuning_has_a_budget():
    """It is stopped wherever it is, and what follows has no alarm."""
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(torch_compile.OverBudget):
        torch_compile._within(1, lambda: time.sleep(60))
    assert torch_compile._within(60, lambda: 7) == 7
    assert signal.getsignal(signal.SIGALRM) is before and signal.alarm(0) == 0


@pytest.mark.slow
def test_whole(tmp_path):
    """Two engines and one that is missing, in processes of their own."""
    out = tmp_path / "out.json"
    engines = "fastdiff-fp32,torch-eager-fp32,physicsnemo-bf16"
    command = [sys.executable, SCRIPT, "--net", "smallest", "--engines", engines, "--rounds", "2", "--json", out]
    subprocess.run([*map(str, command), "--cache", str(tmp_path)], check=True)
    rows = {row["engine"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == set(engines.split(","))
    assert {"engine", "median_ms", "error", "ratio_to_fastdiff", "skipped"} <= set(rows["fastdiff-fp32"])
    assert rows["fastdiff-fp32"]["ratio_to_fastdiff"] == 1 and rows["torch-eager-fp32"]["error"] < 2e-5
    assert rows["physicsnemo-bf16"]["skipped"] or rows["physicsnemo-bf16"]["median_ms"]

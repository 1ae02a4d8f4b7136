"""The script that a GPU is waiting for, tried here as far as it goes: sections, budgets, resuming, what it writes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import harness
import pytest

ROOT = Path(__file__).parents[1]


def run(out, *options):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OUT": str(out)})


def test_under_nine_minutes():
    assert sum(gpu_check.BUDGETS.values()) <= 9 * 60


def test_sections_by_name_and_resuming(tmp_path):
    done = run(tmp_path, "--only", "sanitizer,noise")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert results["machine"]["device"] == "cpu" and re.match(r"\d{4}-\d\d-\d\dT", results["machine"]["date"])
    sections = results["sections"]
    assert (sections["sanitizer"]["state"], sections["sanitizer"]["detail"]) == ("skipped", "no GPU")
    assert sections["noise"]["state"] == "passed" and re.match(r"0 of \d+ values differ", sections["noise"]["detail"])
    page = (tmp_path / "gpu-check.md").read_text()
    assert "| noise | passed |" in page and "| sanitizer | skipped |" in page
    assert "noise_bits.py" in (tmp_path / "gpu-check.log").read_text()

    again = run(tmp_path, "--only", "sanitizer,noise", "--resume")
    assert "noise:" not in again.stdout and "sanitizer: skipped" in again.stdout
    kept = json.loads((tmp_path / "gpu-check.json").read_text())["sections"]["noise"]
    assert kept == sections["noise"], "what passed is kept as it was"


def test_an_unknown_section_is_named(tmp_path):
    assert "--only: 'speed' is not a section; use build, tests" in run(tmp_path, "--only", "speed").stderr


def test_without_a_gpu_it_says_so(tmp_path):
    if harness.DEVICE == "cuda":
        pytest.skip("there is a GPU")
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OUT": str(tmp_path)})
    assert done.returncode == 1 and "torch sees no GPU" in done.stderr and not list(tmp_path.iterdir())


def test_a_section_is_killed_at_the_end_of_its_budget(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.BUDGETS, "noise", 3)

    def endless(section):
        section.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"])

    monkeypatch.setattr(gpu_check, "noise", endless)
    start = time.monotonic()
    record = gpu_check.check("noise", "cpu", tmp_path, [])
    assert record["state"] == "out of time" and record["seconds"] >= 3
    assert time.monotonic() - start < 100 and "begun" in (tmp_path / "gpu-check.log").read_text()


def test_a_broken_section_is_its_own_result(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "noise", lambda section: 1 / 0)
    record = gpu_check.check("noise", "cpu", tmp_path, [])
    assert record["state"] == "failed" and "ZeroDivisionError" in record["detail"]


def test_a_missing_pytest_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    for name in ("tests", "benchmarks"):
        record = gpu_check.check(name, "cpu", tmp_path, [])
        assert record["state"] == "failed" and "pytest is not installed" in record["detail"]


PLAIN = """tests/a.py::test_x[1 b] PASSED  [ 10%]
tests/a.py::test_y FAILED                        [ 20%]
tests/a.py::test_z SKIPPED (why) [ 30%]
tests/a.py::te"""
PARALLEL = """[gw3] [  7%] PASSED tests/a.py::test_x[1 b]
[gw1] [100%] ERROR tests/a.py::test_y
FAILED tests/a.py::test_y - no"""


@pytest.mark.parametrize("text, failed, error, skipped", [(PLAIN, 1, 0, 1), (PARALLEL, 0, 1, 0)], ids=["plain", "parallel"])
def test_tests_are_counted_also_in_a_killed_run(text, failed, error, skipped):
    numbers = {"passed": 1, "failed": failed, "error": error, "skipped": skipped}
    assert gpu_check.counts(text) == numbers | {"failures": ["tests/a.py::test_y"]}


def row(case, seconds, **more):
    return harness.Row("op", case, 8e9, "GB/s", {"fastdiff": seconds, "pytorch": 4.0}, {}, 1e10, **more)


def test_rows_of_a_later_run_replace_earlier_ones():
    old, new = [row("a", 1.0).record(), row("b", 1.0).record()], [row("b", 2.0).record()]
    merged = gpu_check.merged_rows(old, new)
    assert [(r["case"], r["seconds"]["fastdiff"]) for r in merged] == [("a", 1.0), ("b", 2.0)]


def test_the_lower_roof_and_device_time_count():
    made = row("a", 2.0, issue_roof=8e9, replayed={"fastdiff": 1.0, "pytorch": 3.0})
    assert made.rate == 8e9 and made.ratio("pytorch") == 3 and made.lower_roof == 8e9
    cells = harness.markdown([made])[-1].split(" | ")
    assert cells[2:] == ["2000.000", "1000.0000", "8.0 GB/s", "80", "100", "3.00 |"]
    results = {
        "machine": {"device": "x"},
        "sections": {"benchmarks": {"state": "passed", "detail": "", "rows": [made.record()]}},
    }
    assert harness.markdown([made])[-1] in gpu_check.markdown(results)


def test_a_launch_is_measured_from_the_host():
    made = harness.Row("op", "c", 1, "calls/s", {"fastdiff": 5e-6, "pytorch": 1e-5}, {}, None, None, {"fastdiff": 2e-6})
    assert made.ratio("pytorch") == 2 and "5.0 us/call" in harness.markdown([made])[-1]


def test_every_op_has_a_launch_case():
    import bench_launch

    from fastdiff import ops

    kernels = {
        op for op, by in ops.implementations().items() if by["cpu"].name != "composed" and callable(getattr(ops, op, None))
    }
    assert kernels <= set(bench_launch.CASES)

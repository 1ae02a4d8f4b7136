"""The benchmarks' fixtures. `pytest benchmarks/` prints one table at the end and writes it as JSON (see harness.py); with
--full it runs every case.

A benchmark calls `compare` with its variants ("fastdiff" first, then peers), the bytes that one pass must move, and a
check of the result. `pytest benchmarks/ --benchmark-disable` runs each check and both eager variants once, untimed.
pytest-benchmark keeps its own records where it is installed; nothing here needs it.
"""

import importlib.util
import os

import harness
import pytest
from harness import Row

PLUGIN = importlib.util.find_spec("pytest_benchmark") is not None
ROWS: list[Row] = []


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every case (an hour on two cores) instead of the usual ones")
    if not PLUGIN:
        parser.addoption("--benchmark-disable", action="store_true", help="run each check once, untimed")


class Untimed:
    """Stands in for pytest-benchmark's fixture where the plugin is not installed."""

    def __init__(self, disabled: bool):
        self.disabled, self.extra_info = disabled, {}

    def __call__(self, fn):
        return fn()

    def pedantic(self, fn, **_):
        return fn()


if not PLUGIN:

    @pytest.fixture
    def benchmark(request):
        return Untimed(request.config.getoption("--benchmark-disable"))


@pytest.fixture(scope="session")
def copy_roof() -> float:
    return harness.copy_roof()


@pytest.fixture
def compare(benchmark, request):
    """compare(op, case, variants, check, moved= or flops= or images= or calls=, ...): check, then time, then keep a row.

    moved: bytes; flops: floating-point operations; images; calls: launch cost alone. elements and
    instructions_per_element (from the SASS, docs/kernels.md) give a GPU's second roof. skipped: {peer: why it is not here}.
    """

    def run(
        op, case, variants, check, *, moved=None, flops=None, images=None, calls=None, skipped=None,
        elements=0, instructions_per_element=None,
    ):  # fmt: skip
        check()
        if benchmark.disabled:
            benchmark(variants["fastdiff"])
            variants.get("pytorch", variants["fastdiff"])()  # torch.compile's minutes are left to the real run
            return
        seconds = harness.medians(variants)
        replayed, refused = harness.replayed(variants)
        work, unit = next(
            (work, unit)
            for work, unit in ((moved, "GB/s"), (flops, "GFLOP/s"), (images, "images/s"), (calls, "calls/s"))
            if work
        )
        roof = request.getfixturevalue("copy_roof") if moved else None
        issue = harness.issue_roof(work, elements, instructions_per_element)
        row = Row(op, case, work, unit, seconds, {**(skipped or {}), **refused}, roof, issue, replayed)
        ROWS.append(row)
        harness.save(ROWS, os.environ.get("FASTDIFF_BENCH_RECORD", f"throughput-{harness.DEVICE}"))
        benchmark.extra_info.update(row.record())
        benchmark.pedantic(variants["fastdiff"], rounds=5, iterations=1, warmup_rounds=1)

    return run


@pytest.fixture(scope="session")
def device() -> str:
    return harness.DEVICE


@pytest.fixture(scope="session")
def timed():
    """seconds(variants): interleaved medians, without a check or a row."""
    return harness.medians


@pytest.fixture(scope="session")
def missing():
    """missing("diffusers") -> the reason to skip that peer, or None."""

    def reason(package: str) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed (pip install -e '.[bench]')"

    return reason


def pytest_collection_modifyitems(config, items):
    left = [] if config.getoption("--full") else [item for item in items if item.get_closest_marker("full")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def pytest_configure(config):
    config.addinivalue_line("markers", "full: a benchmark's case for --full")
    # Benchmarks measure kernels: a silent fallback to the reference must fail.
    os.environ.setdefault("FASTDIFF_STRICT", "1")


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    write, head = terminalreporter.write_line, harness.header()
    terminalreporter.section("throughput")
    write(f"{head['device']}; {'  '.join(f'{k} {v}' for k, v in head['versions'].items())}")
    write(harness.LEGEND)
    for line in harness.table(ROWS):
        write(line)
    for row in ROWS:
        for peer, why in row.skipped.items():
            write(f"{row.op}, {row.case}: {peer}: {why}")
    write(f"written to {harness.folder()}")

"""The benchmark harness: variants interleaved in one run, medians, GB/s beside the machine's own copy bandwidth.

A benchmark calls `compare` with its variants ("fastdiff" first, then peers), the bytes that one pass must move, and a
check of the result. `pytest benchmarks/` prints one table at the end and writes it as JSON to benchmarks/results/ (or the
folder that OUT names). `pytest benchmarks/ --benchmark-disable` runs each check and both eager variants once, untimed.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

from fastdiff.info import versions
from fastdiff.ops import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15  # interleaved samples of every variant
SAMPLE_SECONDS = 0.02  # least duration of one sample
ROOF_BYTES = {"cpu": 2**27, "cuda": 2**30}  # far beyond the last cache
ROWS: list["Row"] = []


@dataclasses.dataclass
class Row:
    """One line of the table. `work` is what the rate counts: bytes moved, or images."""

    op: str
    case: str
    work: float
    unit: str  # "GB/s" or "images/s"
    seconds: dict[str, float]  # variant -> median
    skipped: dict[str, str]  # peer -> why
    roof: float | None  # in the same unit

    @property
    def rate(self) -> float:
        return self.work / self.seconds["fastdiff"]

    def ratio(self, peer: str) -> float:
        return self.seconds[peer] / self.seconds["fastdiff"]


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(fn, calls: int) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    sync()
    return (time.perf_counter() - start) / calls


def medians(variants: dict) -> dict[str, float]:
    """Median seconds per call, the variants taking turns so that a busy neighbour hits all of them alike."""
    calls = {}
    for name, fn in variants.items():
        seconds_per_call(fn, 2)
        calls[name] = max(1, round(SAMPLE_SECONDS / seconds_per_call(fn, 1)))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, fn in variants.items():
            taken[name].append(seconds_per_call(fn, calls[name]))
    return {name: statistics.median(values) for name, values in taken.items()}


@pytest.fixture(scope="session")
def copy_roof() -> float:
    """Bytes per second of a plain copy, read and write counted: the roof of every memory-bound op."""
    source = torch.ones(ROOF_BYTES[DEVICE] // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)})["copy"]


@pytest.fixture
def compare(benchmark, request):
    """compare(op, case, variants, check, moved= or images=, skipped=): check, then time, then keep a row."""

    def run(op, case, variants, check, *, moved=None, images=None, skipped=None):
        check()
        if benchmark.disabled:
            benchmark(variants["fastdiff"])
            variants["pytorch"]()  # torch.compile's minutes are left to the real run
            return
        seconds = medians(variants)
        work, unit, roof = (moved, "GB/s", request.getfixturevalue("copy_roof")) if moved else (images, "images/s", None)
        row = Row(op, case, work, unit, seconds, skipped or {}, roof)
        ROWS.append(row)
        benchmark.extra_info.update(dataclasses.asdict(row) | {"rate": row.rate})
        benchmark.pedantic(variants["fastdiff"], rounds=5, iterations=1, warmup_rounds=1)

    return run


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def timed():
    return medians


@pytest.fixture(scope="session")
def missing():
    """missing("diffusers") -> the reason to skip that peer, or None."""

    def reason(package: str) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed (pip install -e '.[bench]')"

    return reason


def pytest_configure(config):
    # Benchmarks measure kernels: a silent fallback to the reference must fail.
    os.environ.setdefault("FASTDIFF_STRICT", "1")


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    peers = list(dict.fromkeys(p for row in ROWS for p in row.seconds if p != "fastdiff"))
    write = terminalreporter.write_line
    terminalreporter.section("throughput")
    write(f"{header()['device']}; {'  '.join(f'{k} {v}' for k, v in versions().items())}")
    write("x PEER: how many times faster than it; % roof: of the bandwidth of a plain copy measured in this run")
    write(f"{'op':<17}{'case':<44}{'ms':>9}{'rate':>16}{'% roof':>8}" + "".join(f"{'x ' + p:>12}" for p in peers))
    for row in ROWS:
        rate = f"{row.rate / 1e9:.1f} GB/s" if row.unit == "GB/s" else f"{row.rate:.1f} images/s"
        roof = f"{100 * row.rate / row.roof:.0f}" if row.roof else ""
        ratios = "".join(f"{row.ratio(p):>12.2f}" if p in row.seconds else f"{'-':>12}" for p in peers)
        write(f"{row.op:<17}{row.case:<44}{1e3 * row.seconds['fastdiff']:>9.3f}{rate:>16}{roof:>8}{ratios}")
    for row in ROWS:
        for peer, why in row.skipped.items():
            write(f"{row.op}: peer {peer} skipped: {why}")
    write(f"written to {save()}")


def header() -> dict:
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {native()}"
    return {
        "device": name,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg(),
    }


def save() -> Path:
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"throughput-{DEVICE}.json"
    rows = [dataclasses.asdict(row) | {"rate": row.rate} for row in ROWS]
    path.write_text(json.dumps(header() | {"rows": rows}, indent=1) + "\n")
    return path

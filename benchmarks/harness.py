"""What the benchmarks share, and what gpu_check.py uses without pytest: timing, roofs, rows, the table and its JSON.

Variants are interleaved in one run; medians; GB/s beside the machine's own copy bandwidth. On a GPU each variant is also
captured in a CUDA graph and replayed: device time without the cost of launching from Python.
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from fastdiff.info import versions
from fastdiff.ops import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15  # interleaved samples of every variant
SAMPLE_SECONDS = 0.02  # least duration of one sample
ROOF_BYTES = {"cpu": 2**27, "cuda": 2**30}  # far beyond the last cache
LANES = 128  # threads' instructions that one multiprocessor issues a clock (sm_80 to sm_100: four schedulers of 32)


@dataclasses.dataclass
class Row:
    """One line of the table. `work` is what the rate counts: bytes moved, operations, images or calls."""

    op: str
    case: str
    work: float
    unit: str  # "GB/s", "GFLOP/s", "images/s" or "calls/s"
    seconds: dict[str, float]  # variant -> median, called from Python
    skipped: dict[str, str]  # peer -> why
    roof: float | None  # in the same unit: of a plain copy
    issue_roof: float | None = None  # in the same unit: of the instructions to issue, GPU only
    replayed: dict[str, float] = dataclasses.field(default_factory=dict)  # variant -> median under graph replay, GPU only

    @property
    def best(self) -> dict[str, float]:
        """The seconds that rate and ratios are made of: device time where it is known and not the launch is the question."""
        return self.replayed if "fastdiff" in self.replayed and self.unit != "calls/s" else self.seconds

    @property
    def rate(self) -> float:
        return self.work / self.best["fastdiff"]

    @property
    def lower_roof(self) -> float | None:
        return min((r for r in (self.roof, self.issue_roof) if r is not None), default=None)

    def ratio(self, peer: str) -> float:
        return self.best[peer] / self.best["fastdiff"]

    def record(self) -> dict:
        return dataclasses.asdict(self) | {"rate": self.rate}


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


def medians(variants: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds per call, the variants taking turns so that a busy neighbour hits all of them alike."""
    calls = {}
    for name, fn in variants.items():
        seconds_per_call(fn, 2)
        calls[name] = max(1, round(SAMPLE_SECONDS / seconds_per_call(fn, 1)))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, fn in variants.items():
            taken[name].append(seconds_per_call(fn, calls[name]))
    return {name: statistics.median(values) for name, values in taken.items()}


def replayed(variants: dict) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds per call under CUDA graph replay, and why a variant could not be captured. Empty without a GPU."""
    graphs, refused = {}, {}
    for name, fn in variants.items() if DEVICE == "cuda" else ():
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                fn()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                fn()
            graphs[name] = graph.replay
        except RuntimeError as error:
            refused[name] = f"not captured: {str(error).splitlines()[0]}"
            torch.cuda.synchronize()
    return medians(graphs), refused


def copy_roof() -> float:
    """Bytes per second of a plain copy, read and write counted: the roof of every memory-bound op."""
    source = torch.ones(ROOF_BYTES[DEVICE] // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)})["copy"]


def issue_rate() -> float | None:
    """Threads' instructions per second that the GPU can issue at its highest clock; None without a GPU."""
    if DEVICE == "cpu":
        return None
    properties = torch.cuda.get_device_properties()
    if hasattr(properties, "clock_rate"):
        hertz = properties.clock_rate * 1e3
    else:  # older torch
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        hertz = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6
    return properties.multi_processor_count * LANES * hertz


def issue_roof(work: float, elements: int, instructions_per_element: float | None) -> float | None:
    """The rate at which issuing the kernel's instructions alone would finish the work."""
    rate = issue_rate()
    return None if rate is None or not instructions_per_element else work * rate / (elements * instructions_per_element)


def beyond_cache(batch: int, bytes_per_sample: int) -> int:
    """The batch on a CPU; on a GPU as many samples as take four times its L2 cache."""
    if DEVICE == "cpu":
        return batch
    return max(batch, -(-4 * torch.cuda.get_device_properties().L2_cache_size // bytes_per_sample))


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


def folder() -> Path:
    """Where results go: the folder that OUT names, or benchmarks/results/."""
    path = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(rows: list[Row], name: str = f"throughput-{DEVICE}") -> Path:
    path = folder() / f"{name}.json"
    path.write_text(json.dumps(header() | {"rows": [row.record() for row in rows]}, indent=1) + "\n")
    return path


def show(row: Row, peers: list[str]) -> list[str]:
    """The cells of one line, as table_head names them."""
    scale = {"GB/s": 1e9, "GFLOP/s": 1e9}.get(row.unit, 1)
    launch = row.unit == "calls/s"
    cells = [row.op, row.case, f"{1e3 * row.seconds['fastdiff']:.{4 if launch else 3}f}"]
    cells.append(f"{1e3 * row.replayed['fastdiff']:.4f}" if "fastdiff" in row.replayed else "")
    cells.append(f"{1e6 * row.seconds['fastdiff']:.1f} us/call" if launch else f"{row.rate / scale:.1f} {row.unit}")
    cells.append(f"{100 * row.rate / row.roof:.0f}" if row.roof else "")
    cells.append(f"{100 * row.rate / row.issue_roof:.0f}" if row.issue_roof else "")
    return cells + [f"{row.ratio(p):.2f}" if p in row.best else "-" for p in peers]


def table_head(peers: list[str]) -> list[str]:
    return ["op", "case", "ms", "ms replayed", "rate", "% copy", "% issue", *(f"x {p}" for p in peers)]


def peers_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(p for row in rows for p in row.seconds if p != "fastdiff"))


LEGEND = (
    "x PEER: how many times faster than it; ms replayed: device time under CUDA graph replay, which rates and ratios use"
    " where it is there; % copy: of the bandwidth of a plain copy in this run; % issue: of the rate of issuing"
    " the kernel's instructions"
)


def table(rows: list[Row]) -> list[str]:
    """Lines with aligned columns."""
    peers = peers_of(rows)
    cells = [table_head(peers), *(show(row, peers) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells]  # fmt: skip


def markdown(rows: list[Row]) -> list[str]:
    peers = peers_of(rows)
    head = table_head(peers)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(show(row, peers))} |" for row in rows]


def with_full(cases: list, usual: list) -> list:
    """The cases for pytest.mark.parametrize, those that are not in `usual` left to `pytest benchmarks/ --full`."""
    import pytest

    assert all(case in cases for case in usual)
    return [case if case in usual else pytest.param(case, marks=pytest.mark.full) for case in cases]

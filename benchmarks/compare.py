"""The peer matrix of whole networks: every engine on the same weights and inputs, error beside time.

python benchmarks/compare.py --net ddpm-cifar10 --batch 1 --nfe 2 --device cpu --threads 1 --engines all --json out.json

Each engine runs in a process of its own, so that no pool of threads spins beside another's; the processes take turns, round
by round, unless they would not fit in memory together. What is exported is kept in --cache.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from engines import ENGINES, NAMES, Skipped  # noqa: E402

NETS = ("ddpm-cifar10", "edm-cifar10", "adm-imagenet64", "smallest")
TOGETHER = {"adm-imagenet64": False}  # networks whose engines do not fit in memory together
PER_TURN = 2  # measured calls, after one that is not


@dataclasses.dataclass
class Result:
    """One row. error: of one evaluation's output, relative L2 against float64; null where the weights are not the same."""

    engine: str
    median_ms: float | None = None
    p20_ms: float | None = None
    error: float | None = None
    ratio_to_fastdiff: float | None = None  # its time over fastdiff's at the same precision
    prepare_s: float | None = None
    skipped: str | None = None
    note: str | None = None  # where it is not quite what its name says


class Worker:
    """A process with one engine, which answers a line of JSON to every line."""

    def __init__(self, name: str, options: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", name, "--net", options.net, "--batch", str(options.batch)]
        command += ["--nfe", str(options.nfe), "--threads", str(options.threads), "--cache", str(options.cache)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
        environment["FASTDIFF_CACHE"] = "off"  # what is prepared is measured now
        # libgomp's threads wait by spinning: where a core is not always there, a barrier then takes a time slice
        environment.setdefault("GOMP_SPINCOUNT", "1000")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )

    def answer(self) -> dict:
        """The next line that is meant for us; engines write to stdout what they like."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"skipped": f"its process ended with {self.process.wait()}"}

    def ask(self, word: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def work(name: str, options: argparse.Namespace) -> None:
    """The worker's side: prepare, report, then a turn for every line."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import torch
    from engines.case import STEP, Case, describe

    torch.set_num_threads(options.threads)
    case = Case(options.net, options.batch, Path(options.cache))
    engine, precision = name.rsplit("-", 1)
    start = time.perf_counter()
    try:
        forward = importlib.import_module(ENGINES[engine]).prepare(case, precision)
        prepared = time.perf_counter() - start
        got, truth = forward(case.x(), 0).double(), case.truth()
        error = None if getattr(forward, "own_weights", False) else ((got - truth).norm() / truth.norm()).item()
        if error is not None and not error < 0.5:
            raise RuntimeError(f"its output is wrong: relative error {error:.3g}")
        print(json.dumps({"error": error, "prepare_s": prepared, "note": getattr(forward, "note", None)}), flush=True)
    except (Exception, SystemExit) as found:
        why = str(found) if isinstance(found, Skipped) else describe(found)
        missing = f"not installed: {found}" if isinstance(found, ModuleNotFoundError) else why
        print(json.dumps({"skipped": missing}), flush=True)
        return
    noise = case.x()

    def call() -> float:
        start, x = time.perf_counter(), noise
        for i in range(options.nfe):
            x = x + STEP * forward(x, i)
        return time.perf_counter() - start

    for _ in sys.stdin:
        call()  # the engine before has emptied the caches
        print(json.dumps({"seconds": [call() for _ in range(PER_TURN)]}), flush=True)


def measure(options: argparse.Namespace, names: list[str]) -> list[Result]:
    """All engines, taking turns; or one after another."""
    results = {name: Result(name) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    together = TOGETHER.get(options.net, True)
    for group in [names] if together else [[name] for name in names]:
        workers = {}
        for name in group:
            worker = Worker(name, options)
            ready = worker.answer()
            results[name].error, results[name].prepare_s = ready.get("error"), ready.get("prepare_s")
            results[name].skipped, results[name].note = ready.get("skipped"), ready.get("note")
            note = f"skipped: {ready['skipped']}" if "skipped" in ready else f"ready after {ready['prepare_s']:.1f} s"
            print(f"{name}: {note}", file=sys.stderr, flush=True)
            if "skipped" not in ready:
                workers[name] = worker
        for i in range(options.rounds + 1):
            for name, worker in workers.items():
                answer = worker.ask("run")
                if i and "seconds" in answer:  # the first warms up
                    taken[name] += answer["seconds"]
        for worker in workers.values():
            worker.end()
    for name, seconds in taken.items():
        if seconds:
            results[name].median_ms = 1e3 * statistics.median(seconds)
            results[name].p20_ms = 1e3 * sorted(seconds)[len(seconds) // 5]
    for row in results.values():
        own = results.get(f"fastdiff-{row.engine.rsplit('-', 1)[1]}")
        if own is not None and own.median_ms and row.median_ms:
            row.ratio_to_fastdiff = row.median_ms / own.median_ms
    return list(results.values())


def floor_ms(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that direct convolution would take at this processor's peak, measured now, for each precision."""
    import torch
    from engines.case import Case

    torch.set_num_threads(options.threads)
    operations = Case(options.net, options.batch, Path(options.cache)).operations() * options.batch * options.nfe
    return {name: 1e3 * operations / _peak(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}


def _peak(dtype) -> float:
    """Operations per second of the library's largest matrix product: what its convolutions come near."""
    import torch

    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def show(rows: list[Result]) -> str:
    """The table, fastest first."""
    ordered = sorted(rows, key=lambda r: r.median_ms or float("inf"))
    lines = [f"{'engine':<20}{'median ms':>11}{'p20 ms':>10}{'error':>10}{'x fastdiff':>12}"]
    for r in ordered:
        if r.median_ms is None:
            lines.append(f"{r.engine:<20}  skipped: {r.skipped}")
            continue
        error = "-" if r.error is None else f"{r.error:.1e}"
        ratio = "-" if r.ratio_to_fastdiff is None else f"{r.ratio_to_fastdiff:.2f}"
        lines.append(f"{r.engine:<20}{r.median_ms:>11.1f}{r.p20_ms:>10.1f}{error:>10}{ratio:>12}  {r.note or ''}".rstrip())
    return "\n".join(lines)


def draw(rows: list[Result], floors: dict[str, float], title: str, path: Path) -> None:
    """Bars of both precisions with the time of direct convolution at the processor's peak as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, precision in zip(axes, ("fp32", "bf16"), strict=True):
        kept = [r for r in rows if r.engine.endswith(precision) and r.median_ms]
        kept.sort(key=lambda r: -r.median_ms)
        names = [r.engine.removesuffix(f"-{precision}") for r in kept]
        colours = ["tab:orange" if name == "fastdiff" else "tab:blue" for name in names]
        bars = axis.barh(names, [r.median_ms for r in kept], color=colours)
        axis.bar_label(bars, labels=[f"{r.median_ms:.0f} ms" for r in kept], padding=3)
        axis.axvline(floors[precision], color="black", linestyle="--", linewidth=1, label="direct convolution at peak")
        axis.set_xlim(0, 1.2 * max([r.median_ms for r in kept] + [floors[precision]]))
        axis.set_xlabel("milliseconds")
        axis.set_title(precision)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="ddpm-cifar10")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--nfe", type=int, default=2, help="network evaluations in each measured call")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="cpu alone so far")
    parser.add_argument("--threads", type=int, default=1, help="of each engine, pinned to as many cores")
    parser.add_argument("--engines", default="all", help=f"all, or some of {', '.join(NAMES)}, with commas")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each engine, two measured calls each")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fastdiff-compare")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--png", type=Path, help="draw them there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.worker:
        return work(options.worker, options)
    names = NAMES if options.engines == "all" else options.engines.split(",")
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"--engines: {', '.join(unknown)} not known; use all or some of {', '.join(NAMES)}")
    rows, floors = measure(options, names), floor_ms(options)
    print(show(rows))
    print("direct convolution at the library's peak: " + ", ".join(f"{k} {v:.1f} ms" for k, v in floors.items()))
    record = {"net": options.net, "batch": options.batch, "nfe": options.nfe, "threads": options.threads, "floor_ms": floors}
    if options.json:
        from harness import header

        text = json.dumps(record | header() | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
        options.json.write_text(text + "\n")
    if options.png:
        title = f"{options.net}, batch {options.batch}, nfe {options.nfe}, {options.threads} thread(s)"
        draw(rows, floors, title, options.png)


if __name__ == "__main__":
    main()

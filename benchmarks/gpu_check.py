"""make gpu-check: everything that a GPU has to say about the kernels, in under nine minutes, from a bare checkout.

Needs Python with torch >= 2.11, Triton and pytest, and nvcc for the CUDA C++ kernels; no package index, for
nothing is installed. Sections, each within its own budget and killed at its end:

    build       the extension in place, with CUDA; where that fails, without, so that the rest can still run
    tests       tests/kernels and tests/ops with FASTDIFF_STRICT=1, on the GPU where they can be
    sanitizer   compute-sanitizer memcheck and racecheck on at most 20 launches
    noise       the noise's bits on the device against the CPU
    benchmarks  launch cost, then every op, most telling first

gpu-check.json and gpu-check.md are rewritten as each section ends, in the folder that OUT names or benchmarks/results/;
gpu-check.log has the output. `--only noise,benchmarks` runs those again and keeps what is recorded of the others; `--resume`
runs what has not passed. `--device cpu` tries the script on a machine without a GPU.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"build": 110, "tests": 130, "sanitizer": 80, "noise": 30, "benchmarks": 170}  # seconds; under 540 in all
FIRST = ("launch", "denoise_step", "philox_normal", "group_norm_silu", "group_norm_attention", "add_noise")
COMPILERS_ONLY = ("test_compile_ahead.py", "test_cuda_machine_code.py", "test_kernel_table.py")  # they need no GPU
NO_PYTEST = (
    "pytest is not installed for {}; carry its wheel (pytest, pluggy, iniconfig, packaging, pygments) and run this again"
)


class Section:
    """One section while it runs: commands within what is left of its budget, their output in the log."""

    def __init__(self, name: str, device: str, out: Path, benches: list[str]):
        self.name, self.device, self.out, self.benches = name, device, out, benches
        self.end = time.monotonic() + BUDGETS[name]
        self.record: dict = {"state": "passed", "detail": ""}

    def fail(self, detail: str) -> None:
        self.record["state"] = "failed"
        self.record["detail"] = "; ".join(filter(None, (self.record["detail"], detail)))

    def run(self, command: list, **environment: str) -> tuple[int | None, str]:
        """Exit status, None when the budget ended first, and the output."""
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **environment}
        command = list(map(str, command))
        with open(self.out / "gpu-check.log", "a+b") as log:
            log.write(f"\n== {self.name}: {' '.join(command)}\n".encode())
            log.flush()
            start = log.seek(0, os.SEEK_END)
            child = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=variables | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                status: int | None = child.wait(timeout=max(0.1, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                status = None
                self.record["state"] = "out of time"
            log.seek(start)
            return status, log.read().decode(errors="replace")


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def python(*arguments) -> list:
    return [sys.executable, *arguments]


def build(section: Section) -> None:
    kernels = ROOT / "fastdiff" / "kernels"  # what an installed package gets from kernels/triton
    if not kernels.exists():
        kernels.symlink_to(Path("..", "kernels", "triton"), target_is_directory=True)
    command, jobs = python("setup.py", "build_ext", "--inplace"), str(os.cpu_count() or 1)
    if section.device == "cuda":
        import torch

        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        wanted = {"FASTDIFF_BUILD": "cuda", "MAX_JOBS": jobs}
        wanted["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", capability)
        status, text = section.run(command, **wanted)
        if status == 0:
            section.record["detail"] = "CPU and CUDA kernels"
            return
        section.fail(f"with CUDA: {last_line(text)}")
    status, text = section.run(command, FASTDIFF_BUILD="cpu", MAX_JOBS=jobs)
    if status != 0:
        section.fail(f"without CUDA: {last_line(text)}")
    else:
        section.record["detail"] = "; ".join(filter(None, (section.record["detail"], "CPU kernels built")))


def pytest_missing(section: Section) -> bool:
    if importlib.util.find_spec("pytest"):
        return False
    section.fail(NO_PYTEST.format(sys.executable))
    return True


def tests(section: Section) -> None:
    if pytest_missing(section):
        return
    options = ["-v", "-m", "not slow", "-p", "no:cacheprovider"]
    options += [f"--ignore=tests/kernels/{name}" for name in COMPILERS_ONLY]
    if importlib.util.find_spec("xdist"):
        options += ["-n", min(8, os.cpu_count() or 1)]
    command = python(
        "-m", "pytest", "tests/kernels", "tests/ops", "-v", "-m", "not slow", "-p", "no:cacheprovider", *options
    )
    status, text = section.run(command, FASTDIFF_STRICT="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"))
    section.record |= counts(text)
    if status not in (0, None):
        section.fail(last_line(text))


def counts(text: str) -> dict:
    """How many tests ended how, from -v's lines: they are there for a killed run too."""
    words = "(PASSED|FAILED|ERROR|SKIPPED)"
    ended = re.findall(rf"(?m)^(\S+::.*?) {words}\b", text)
    ended += [(test, word) for word, test in re.findall(rf"(?m)^\[gw\d+\] \[ *\d+%\] {words} (.*?)\s*$", text)]  # xdist
    found = [word for _, word in ended]
    failures = [test for test, word in ended if word in ("FAILED", "ERROR")]
    return {word.lower(): found.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")} | {
        "failures": failures[:40]
    }


def sanitizer(section: Section) -> None:
    tool = shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if tool is None:
        section.record |= {"state": "skipped", "detail": "compute-sanitizer is not installed"}
        return
    for check in ("memcheck", "racecheck"):
        # Without the caching allocator each tensor is an allocation of its own, whose ends memcheck guards.
        command = [tool, "--tool", check, "--error-exitcode", "9", *python("tests/kernels/run_cases.py", "--limit", "20")]
        status, text = section.run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if "Device not supported" in text:
            section.record |= {"state": "skipped", "detail": "compute-sanitizer does not support this machine's device"}
            return
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        section.record[check] = found[-1] if found else last_line(text)
        if status not in (0, None):
            section.fail(f"{check}: {section.record[check]}")


def noise(section: Section) -> None:
    size = 2**22 if section.device == "cuda" else 2**16
    status, text = section.run(python("benchmarks/noise_bits.py", "--device", section.device, "--size", size))
    section.record["detail"] = last_line(text)
    if status not in (0, None):
        section.record["state"] = "failed"


def benchmarks(section: Section) -> None:
    if pytest_missing(section):
        return
    there = [path.stem.removeprefix("bench_") for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))]
    names = [n for n in (*FIRST, *(n for n in there if n not in FIRST and n != "sample")) if n in there]
    rows, section.record["files"] = [], {}
    for name in section.benches or names:
        if time.monotonic() > section.end - 5:
            section.record["files"][name] = "out of time"
            section.record["state"] = "out of time"
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = () if section.device == "cuda" else ("--benchmark-disable",)
            command = python("-m", "pytest", f"benchmarks/bench_{name}.py", "-q", "-p", "no:cacheprovider", *options)
            status, text = section.run(command, OUT=folder, FASTDIFF_STRICT="1", FASTDIFF_BENCH_RECORD="rows")
            written = Path(folder, "rows.json")
            rows += json.loads(written.read_text())["rows"] if written.exists() else []
        section.record["files"][name] = {0: "passed", None: "out of time"}.get(status, last_line(text))
        if status not in (0, None):
            section.fail(f"{name}: {last_line(text)}")
    section.record["rows"] = rows


def machine(device: str) -> dict:
    """Device, versions, date, commit."""
    import torch

    found = {"device": "cpu", "python": sys.version.split()[0], "torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        found["device"] = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found["cuda"] = torch.version.cuda
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    git = (
        subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        if shutil.which("git")
        else None
    )
    found["commit"] = git.stdout.strip() if git and git.returncode == 0 else "unknown"
    found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return found


def merged_rows(old: list[dict], new: list[dict]) -> list[dict]:
    """Every (op, case) once, the newer measurement winning."""
    return list({(row["op"], row["case"]): row for row in (*old, *new)}.values())


def markdown(results: dict) -> str:
    lines = [f"# GPU check: {results['machine']['device']}", ""]
    lines += ["; ".join(f"{key} {value}" for key, value in results["machine"].items()), ""]
    lines += ["| section | state | seconds | |", "|---|---|---|---|"]
    for name, record in results["sections"].items():
        numbers = [f"{record[key]} {key}" for key in ("passed", "failed", "error", "skipped") if key in record]
        told = [record["detail"], *numbers, *(record[key] for key in ("memcheck", "racecheck") if key in record)]
        text = "; ".join(filter(None, told)).replace("|", "\\|")
        lines.append(f"| {name} | {record['state']} | {record.get('seconds', 0):.0f} | {text} |")
    if rows := results["sections"].get("benchmarks", {}).get("rows"):
        import harness

        made = [harness.Row(**{k: v for k, v in row.items() if k != "rate"}) for row in rows]
        lines += ["", *harness.markdown(made), "", harness.LEGEND]
    return "\n".join(lines) + "\n"


def write(out: Path, results: dict) -> None:
    (out / "gpu-check.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "gpu-check.md").write_text(markdown(results))


def check(name: str, device: str, out: Path, benches: list[str]) -> dict:
    """Run one section; whatever goes wrong in it is its result."""
    start = time.monotonic()
    section = Section(name, device, out, benches)
    if device == "cpu" and name == "sanitizer":
        section.record |= {"state": "skipped", "detail": "no GPU"}
    else:
        try:
            globals()[name](section)
        except Exception as error:
            section.fail(f"{type(error).__name__}: {error}")
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return section.record | {
        "seconds": round(time.monotonic() - start, 1),
        "budget": BUDGETS[name],
        "date": when,
        "on": device,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BUDGETS), help="sections, separated by commas")
    parser.add_argument("--benches", default="", help="files of the benchmarks section, say denoise_step,launch")
    parser.add_argument("--resume", action="store_true", help="leave out sections that are recorded as passed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    args.only = [name for name in args.only.split(",") if name]
    if unknown := [name for name in args.only if name not in BUDGETS]:
        parser.error(f"--only: {unknown[0]!r} is not a section; use {', '.join(BUDGETS)}")
    return args


def main() -> None:
    args = parse()
    sys.path.insert(0, str(ROOT))
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check.py: torch sees no GPU. --device cpu tries the script without one.")
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    out.mkdir(parents=True, exist_ok=True)
    before = out / "gpu-check.json"
    results = json.loads(before.read_text()) if before.exists() else {"sections": {}}
    results["machine"] = machine(args.device)
    for name in args.only:
        old = results["sections"].get(name, {})
        if args.resume and old.get("state") == "passed":
            continue
        made = check(name, args.device, out, [n for n in args.benches.split(",") if n])
        if "rows" in made:
            made["rows"] = merged_rows(old.get("rows", []), made["rows"])
        results["sections"][name] = made
        write(out, results)
        print(f"{name}: {made['state']} in {made['seconds']:.0f} s  {made['detail']}", flush=True)
    print(f"written to {out / 'gpu-check.json'} and {out / 'gpu-check.md'}")
    sys.exit(any(results["sections"][name]["state"] in ("failed", "out of time") for name in args.only))


if __name__ == "__main__":
    main()

"""python tests/kernels/kernel_table.py: compile every kernel and write what each one takes to docs/kernels.md."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import ahead_cases
import cuda_sources
from occupancy import occupancy

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
ARCHITECTURES = (80, 90, 100)
HEAD = """# Kernels: registers, shared memory, occupancy

Made by `make kernel-table` (`python tests/kernels/kernel_table.py`), which compiles every kernel on a machine without a GPU.
The numbers move a little with the compilers; these: {versions}.

A cell is registers per thread / bytes of shared memory per block / theoretical occupancy, the share of a multiprocessor's 64
warps that can be resident, by the limits in `tests/kernels/occupancy.py`. A dash: not compiled for that architecture. No
kernel spills registers, except where a note says so; `tests/kernels/test_compile_ahead.py` and `test_cuda_machine_code.py`
hold that.

On GPUs of compute capability 9.0 and later every kernel is launched by programmatic dependent launch: its blocks are placed
while the kernel in front of it still runs, and wait for the end of that one (`griddepcontrol.wait`) before they touch global
memory. `kernels/triton/dependent.py` has the rule and why it suffices. `csrc/cuda/launch.cuh` does the same for CUDA C++;
there the version of the code decides, not the GPU, for PTX of sm_80 waits nowhere. The tests above hold that every kernel's
code waits, and that sm_80's has none of it. `FASTDIFF_PDL=0` launches without. No GPU has run it: unmeasured.
"""


def versions() -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = [f"Triton {triton.__version__}"]
    for name in ("ptxas", "ptxas-blackwell"):
        text = subprocess.run([tool / name, "--version"], capture_output=True, text=True).stdout
        found.append(f"its {name} {release(text)}")
    if cuda_sources.nvcc():
        text = subprocess.run([cuda_sources.nvcc(), "--version"], capture_output=True, text=True).stdout
        found.append(f"nvcc {release(text)}")
    return ", ".join(found)


def release(text: str) -> str:
    return re.search(r"release ([\d.]+)", text)[1]


def cell(fact: dict) -> str:
    if not fact["threads"]:
        return f"{fact['reg']} / {fact['shared']} / ?"
    share = occupancy(fact["architecture"], fact["threads"], fact["reg"], fact["shared"])
    return f"{fact['reg']} / {fact['shared']} / {100 * share:.0f} %"


def table(facts: list[dict], columns: tuple[str, ...]) -> list[str]:
    """One row for each distinct `columns`, one column for each architecture."""
    rows: dict[tuple, dict] = {}
    for fact in facts:
        rows.setdefault(tuple(str(fact[c]) for c in columns), {})[fact["architecture"]] = cell(fact)
    lines = [" | ".join(("", *columns, *(f"sm_{a}" for a in ARCHITECTURES), "")).strip()]
    lines.append("|" + "---|" * (len(columns) + len(ARCHITECTURES)))
    for key, cells in rows.items():
        lines.append(" | ".join(("", *key, *(cells.get(a, "-") for a in ARCHITECTURES), "")).strip())
    return lines


def triton_section(facts: list[dict]) -> list[str]:
    facts = [f | {"kernel": f"`{f['kernel']}`"} for f in facts if f["case"] != "huge"]
    notes = [
        f"- {op}, {kernel}: up to {most} bytes of stack; {why}."
        for op, stacks in ahead_cases.declared("STACK").items()
        for kernel, (most, why) in stacks.items()
    ]
    return ["", "## Triton", "", *table(facts, ("op", "kernel", "case", "threads")), "", *notes]


def cuda_section(folder: Path) -> list[str]:
    facts = []
    for source in cuda_sources.SOURCES:
        bounds = cuda_sources.threads(source)
        for fact in cuda_sources.facts(source, folder):
            reserved = 1024 if fact["architecture"] >= 90 else 0  # what cuobjdump counts in from sm_90 on
            kernel = f"`{cuda_sources.demangled(fact['function'])}`"
            fact |= {"op": source.stem, "kernel": kernel, "threads": bounds[fact["kernel"]]}
            facts.append(fact | {"shared": max(0, fact["shared"] - reserved)})
    facts.sort(key=lambda f: (f["op"], f["kernel"]))
    return ["", "## CUDA C++", "", "Threads are the launch bound, shared memory is what is declared statically.", "",
            *table(facts, ("op", "kernel", "threads"))]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = [HEAD.format(versions=versions()).rstrip()]
        lines += triton_section(ahead_cases.compiled(Path(folder, "facts.json")))
        if reason := cuda_sources.why_not():
            sys.exit(f"kernel_table.py: {reason}; the page lists the CUDA C++ kernels too")
        lines += cuda_section(Path(folder))
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()

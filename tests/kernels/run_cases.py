"""python tests/kernels/run_cases.py: launch the cases of ahead/<op>.py once each on the GPU, for compute-sanitizer to watch.

The launches that compile_ahead.py compiles, at most --limit of them and the same number from every op; then, where the CUDA
C++ kernel serves an op, the same calls through the dispatcher. Prints one line a case and a last one that counts them.
"""

import argparse
import contextlib
import importlib
import importlib.util
from pathlib import Path

import torch

from fastdiff.ops import _register

AHEAD = sorted(Path(__file__).with_name("ahead").glob("*.py"))


class Enough(Exception):
    """Raised in the middle of a file's cases when its share has run."""


def load(path):
    """The cases of one file, freshly: its launchers are bound when it is imported."""
    spec = importlib.util.spec_from_file_location(f"run_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(path, share):
    """The first `share` cases of one file; how many ran."""
    started = []

    def case(name):
        if len(started) == share:
            raise Enough
        started.append(name)
        print(f"case {path.stem}: {name}", flush=True)

    with contextlib.suppress(Enough):
        load(path).cases(case)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(started)


def through_dispatcher(op):
    """Let the launcher's name stand for the op itself, which the CUDA C++ kernel serves."""
    module = importlib.import_module(f"fastdiff.kernels.{op}")
    setattr(module, op, _register.overload(op))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=20, help="most cases in all")
    parser.add_argument("--only", default="", help="ops, separated by commas")
    parser.add_argument("--device", default="cuda", help="cpu: under TRITON_INTERPRET=1, to try the program itself")
    args = parser.parse_args()
    torch.set_default_device(args.device)
    paths = [p for p in AHEAD if not args.only or p.stem in args.only.split(",")]
    native = [p for p in paths if args.device == "cuda" and _register.serving(p.stem, "cuda") == "cuda"]
    share = max(1, args.limit // (len(paths) + len(native)))
    ran = sum(launch(path, share) for path in paths[: args.limit])
    for path in native[: args.limit - ran]:
        through_dispatcher(path.stem)
        ran += launch(path, share)
    print(f"ran {ran} cases of {len(paths)} ops, {len(native)} of them also in CUDA C++")


if __name__ == "__main__":
    main()

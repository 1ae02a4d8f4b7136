"""Memory of a whole network while it samples, each way in a process of its own, beyond what the imports take.

python benchmarks/memory.py --net ddpm-cifar10 --threads 1

anonymous: memory that only swapping could free; resident: with the mapped pages of files, which the system may drop.
`made`: their peaks while the program is made; `sampling`: their peaks while it samples; ms: a call of two evaluations.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

WAYS = {
    "eager": "the network as it is",
    "auto": "sample(model, compile='fast'): the caller holds the model, too",
    "compiled": "fastdiff.compile(fastdiff.load(path))",
    "in memory": "the same with FASTDIFF_CACHE=off",
    "loaded": "fastdiff.load of a saved program",
}


def now() -> dict[str, float]:
    """MB of this process."""
    with open("/proc/self/smaps_rollup") as file:
        found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in file if line.endswith("kB\n")}
    return {"anonymous": found["Anonymous"], "resident": found["Rss"]}


class Peak:
    """The most that `now` gives while it is open, looked at all the time."""

    def __enter__(self):
        self.most, self.over = now(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            self.most = {name: max(value, self.most[name]) for name, value in now().items()}

    def __exit__(self, *failure):
        self.over.set()
        self.thread.join()


def work(way: str, path: Path, saved: Path) -> None:
    """One way, here."""
    import torch

    import fastdiff

    fastdiff.sample("mnist-ect", 2, seeds=[0], compile="off")  # what loads at the first call
    gc.collect()
    before = now()
    with Peak() as made:
        model = fastdiff.load(saved if way == "loaded" else path)
        if way in ("compiled", "in memory"):
            model = fastdiff.compile(model, batch=8)
        call = {"eager": "off", "auto": "fast"}.get(way, "auto")
        fastdiff.sample(model, 1, seeds=[0], compile=call)
    gc.collect()
    taken = []
    with Peak() as sampling:
        for seed in range(8):
            start = time.perf_counter()
            result = fastdiff.run(model, 2, seeds=[seed], compile=call)
            taken.append(time.perf_counter() - start)
    beyond = [{name: value - before[name] for name, value in peak.most.items()} for peak in (made, sampling)]
    print(json.dumps([*beyond, 1e3 * sorted(taken)[len(taken) // 2], result.engine, torch.get_num_threads()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="ddpm-cifar10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastdiff-memory")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path, saved = (options.folder / f"{options.net}{kind}.safetensors" for kind in ("", "-fast"))
    if options.worker:
        return work(options.worker, path, saved)
    if not (path.is_file() and saved.is_file()):
        from engines.case import Case

        import fastdiff

        model = Case(options.net, 1, options.folder).model()
        model.save(path)
        fastdiff.compile(model, batch=8).save(saved)
    print(f"{'way':<11}{'made: anonymous':>16}{'resident':>10}{'sampling: anonymous':>21}{'resident':>10}{'ms':>8}")
    for way in options.ways.split(","):
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        environment |= {"FASTDIFF_CACHE": "off"} if way == "in memory" else {}
        command = [sys.executable, __file__, "--worker", way, "--net", options.net, "--folder", str(options.folder)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        made, sampling, ms, engine, _ = json.loads(out.splitlines()[-1])
        print(f"{way:<11}{made['anonymous']:>13.0f} MB{made['resident']:>7.0f} MB{sampling['anonymous']:>18.0f} MB", end="")
        print(f"{sampling['resident']:>7.0f} MB{ms:>8.1f}  {WAYS[way]}; {engine}", flush=True)


if __name__ == "__main__":
    main()

"""How good the packaged models' digits are, beside the same numbers of real digits: one table, quality.json, neighbours.png.

    python benchmarks/quality.py --data DIR --out FOLDER
    python benchmarks/quality.py --data DIR --search-times        # good evaluation times for a consistency model

For every model and number of evaluations: how often a classifier reads the digit that was asked for, the mean distance
between two images of a class over that of real digits, and FD-LeNet beside its floor (tests/quality/measures.py says what
that is). neighbours.png shows samples with their nearest training images. Sample i has seed i; searching uses other seeds.
"""

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.images import save_grid
from fastdiff.metrics.evaluation import natural_labels
from fastdiff.model import Model, load
from fastdiff.sample import run
from fastdiff.schedules import karras
from fastdiff.training import load_mnist

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "quality"))
import measures

FIGURES = 1_000  # the packaged models' promises are about seeds 0 ... 999
SHOWN = 64  # samples whose neighbours are shown
SEARCH_SEED = 10**6  # the search must not choose times that suit the samples it is judged by
LAST_TIMES = np.geomspace(0.3, 3.0, 6)  # first pass of the search
FACTORS = (2.0, 1.4, 1.2)  # then one time at a time, up or down by these


class Judge:
    """The classifier and the reference numbers, loaded once."""

    def __init__(self):
        self.net = measures.judging_classifier()
        self.about = self.net.info
        self.reference, _ = measures.load_reference()

    def samples(self, model: Model, nfe: int, n: int, first: int = 0, **options):
        """n samples with real class frequencies, seeds first ... first + n - 1, and their labels."""
        labels = natural_labels(n, self.reference["label_counts"])
        return run(model, nfe, seeds=range(first, first + n), labels=labels, **options), labels

    def row(self, name: str, model: Model, nfe: int, n: int) -> tuple[dict, Tensor]:
        """One line of the table, and the images."""
        made, labels = self.samples(model, nfe, n)
        few = min(n, FIGURES)
        return {
            "model": name,
            "hash": model.hash(),
            "nfe": nfe,
            "n": n,
            "plan": made.plan.describe(),
            "times": made.plan.times,
            "seeds": [0, n - 1],
            "seconds": made.seconds,
            **measures.judge(made.images, labels, self.net, self.reference),
            f"first_{FIGURES}": measures.judge(made.images[:few], labels[:few], self.net, self.reference),
        }, made.images


def neighbours(images: Tensor, labels: list[int], train: Tensor, reference: dict, path: Path, metadata: dict) -> dict:
    """Write pairs (sample, nearest training image) as PNG; return distances over those of real test images of the class.

    A copy has ratio 0. Classes are compared with themselves, because two ones are always closer than two eights.
    """
    distance, index = measures.nearest(images, train)
    pairs = torch.cat([images, measures.scaled(train[index])], 3)  # [n, 1, 28, 56]
    pairs = pairs.repeat_interleave(2, 2).repeat_interleave(2, 3)  # large enough to judge by eye
    pairs = torch.nn.functional.pad(pairs, (3, 3, 3, 3))  # a grey frame around each pair
    save_grid(pairs, path, metadata | {"pairs": "sample, nearest training image", "index": index.tolist()}, columns=8)
    ratio = distance.numpy() / reference["nearest.median"][labels]
    real = reference["nearest.ratios"]
    return {
        "image": path.name,
        "seeds": [0, len(images) - 1],
        "ratio_median": float(np.median(ratio)),
        "ratio_least": float(ratio.min()),
        "real_ratio_least": float(real[0]),
        "real_ratio_1_percent": float(np.quantile(real, 0.01)),
        "identical": int((distance < 0.05).sum()),  # cdist in float32 is good to about 0.02 at distance 0
    }


def search(judge: Judge, model: Model, nfe: int, n: int) -> list[float]:
    """Times for nfe >= 2 evaluations with the least FD-LeNet, noise being the same for all candidates.

    First the model's recorded times and EDM's grid down to each of LAST_TIMES, then one time at a time.
    """
    high, tried = float(model.schedule.t_max), {}

    def fd(times: tuple[float, ...]) -> float:
        if times not in tried:
            made, labels = judge.samples(model, nfe, n, SEARCH_SEED, times=list(times))
            tried[times] = measures.judge(made.images, labels, judge.net, judge.reference)
            shown = ", ".join(f"{t:.4g}" for t in times)
            print("  {:32} FD {fd:7.3f}  agreement {agreement:.3f}  diversity {diversity:.3f}".format(shown, **tried[times]))
        return tried[times]["fd"]

    def grid(last: float) -> tuple[float, ...]:
        return tuple(round(float(t), 4) for t in karras(high, last, nfe))

    recorded = [tuple(model.times[nfe])] if nfe in model.times else []
    best = min([*recorded, *(grid(last) for last in LAST_TIMES)], key=fd)
    for factor in FACTORS:
        for i in reversed(range(1, nfe)):
            moved = [(*best[:i], round(best[i] * f, 4), *best[i + 1 :]) for f in (factor, 1 / factor)]
            best = min([best, *(t for t in moved if all(np.diff(t) < 0))], key=fd)
    least = measures.floor(judge.reference, n)
    print(f"best times for nfe {nfe}: {list(best)}, FD-LeNet {fd(best):.3f} (floor {least:.3f})")
    return list(best)


def table(rows: list[dict]) -> str:
    """The rows as fixed-width text."""
    head = f"{'model':<14}{'NFE':>4}{'n':>8}{'agreement':>11}{'first 1000':>11}{'diversity':>11}{'least':>7}"
    lines = [head + f"{'FD-LeNet':>10}{'floor':>8}{'ratio':>7}{'/halves':>9}{'s':>8}"]
    for r in rows:
        few = r[f"first_{FIGURES}"]["agreement"]
        lines.append(
            f"{Path(r['model']).stem[:13]:<14}{r['nfe']:>4}{r['n']:>8,}{r['agreement']:>11.2%}{few:>11.2%}{r['diversity']:>11.3f}"
            f"{r['diversity_least']:>7.3f}{r['fd']:>10.3f}{r['floor']:>8.4f}{r['ratio']:>7.1f}{r['ratio_halves']:>9.1f}{r['seconds']:>8.1f}"
        )
    return "\n".join(lines)


def report(args: argparse.Namespace, judge: Judge) -> None:
    """Measure every model, print the table, write JSON and PNG."""
    train, rows, near = load_mnist(args.data), [], None
    for name in args.models:
        model = load(name)
        consistency = model.family == "consistency"
        for nfe in args.nfe if consistency else [args.teacher_nfe]:
            row, images = judge.row(name, model, nfe, args.n if consistency else args.teacher_n)
            rows.append(row)
            print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
            if consistency and (near is None or nfe == 2):
                shown = images[:SHOWN]
                labels = natural_labels(len(shown), judge.reference["label_counts"])
                about = {"model": model.hash(), "nfe": nfe, "seeds": [0, len(shown) - 1], "labels": labels}
                near = neighbours(shown, labels, train.images, judge.reference, args.out / "neighbours.png", about)
                near["nfe"] = nfe
    print(table(rows))
    print(
        f"floor: n real images of half A against half B, ratio: FD-LeNet over it; /halves: over the distance of the whole "
        f"halves, {judge.reference['floor.30000'][0]:.4f}, though fewer images than theirs raise any FD"
    )
    if near:
        print(
            "distance to the nearest training image, {0} samples over a real test image: median {ratio_median:.2f}, "
            "least {ratio_least:.2f} (real: 1 and {real_ratio_least:.2f}); identical: {identical}".format(SHOWN, **near)
        )
    result = {"rows": rows, "neighbours": near, "classifier": judge.about, "floor": floor_sizes(judge), **environment()}
    (args.out / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out / 'quality.json'}" + (f" and {args.out / 'neighbours.png'}" if near else ""))


def floor_sizes(judge: Judge) -> dict[int, float]:
    return {n: measures.floor(judge.reference, n) for n in measures.FLOOR_SIZES}


def environment() -> dict:
    """Where and when."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"fastdiff": fastdiff.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }


def integers(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4]."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four MNIST files (the search needs none)")
    parser.add_argument("--models", nargs="+", default=["mnist-ect", "mnist-edm"], help="packaged names or paths")
    parser.add_argument("--nfe", type=integers, default=[1, 2, 4], help="of consistency models, with commas: 1,2,4")
    parser.add_argument("--n", type=int, default=10_000, help="images per row of a consistency model")
    parser.add_argument("--teacher-nfe", type=int, default=35, help="evaluations of other models (Heun's method)")
    parser.add_argument("--teacher-n", type=int, default=2_000, help="images per row of other models, which cost 35 each")
    parser.add_argument("--search-times", action="store_true", help="find times for --nfe on --search-n images instead")
    parser.add_argument("--search-n", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for quality.json and neighbours.png")
    args = parser.parse_args()
    judge = Judge()
    if args.search_times:
        for nfe in (k for k in args.nfe if k > 1):
            search(judge, load(args.models[0]), nfe, args.search_n)
        return
    if args.data is None:
        parser.error("--data DIR is needed: neighbours are looked for among the training images")
    args.out.mkdir(parents=True, exist_ok=True)
    report(args, judge)


if __name__ == "__main__":
    main()

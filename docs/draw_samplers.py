"""Draw docs/samplers.png: FD-LeNet of the packaged models' digits against network evaluations, for every sampler.

    python docs/draw_samplers.py                    # draws what docs/samplers.json holds
    python docs/draw_samplers.py --measure          # measures what is missing there first; stop it and go on at will

One network, mnist-edm, serves all families: it denoises at any sigma / alpha, so a DDPM chain or a VE SDE is another way of
scaling the same path. mnist-ect makes the few-step panel. Seeds are 0, 1, ... at every point, classes as in MNIST.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.atomic import atomically
from fastdiff.metrics.evaluation import natural_labels
from fastdiff.model import Model
from fastdiff.sample import run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "quality"))

import measures

HERE = Path(__file__).parent
NUMBERS, PICTURE = HERE / "samplers.json", HERE / "samplers.png"
NFE = (4, 8, 16, 32)
IMAGES = 200

# panel -> samplers; the model's path each of them runs on
PANELS = {
    "DDPM chain": ("ddpm", "ddim", "analytic-ddpm", "fast-ddpm", "watson", "san-roman"),
    "ODE, single-step": (
        "euler",
        "heun",
        "midpoint",
        "dpm2",
        "dpm-solver-2s",
        "dpm-solver-3s",
        "dpm-solver++2s",
        "dpm-solver++3s",
        "rk45",
    ),
    "ODE, multistep": (
        "dpm-solver-2m",
        "dpm-solver-3m",
        "dpm-solver++2m",
        "dpm-solver++3m",
        "deis",
        "ipndm",
        "lms",
        "pndm",
        "unipc",
    ),
    "SDE of the score": ("ancestral", "annealed-langevin", "euler-maruyama", "predictor-corrector", "reverse-diffusion"),
    "SDE, other noise": (
        "dpm-solver++2s-ancestral",
        "dpm-solver++sde",
        "dpm2-ancestral",
        "euler-ancestral",
        "restart",
        "sde-dpm-solver++2m",
        "sde-dpm-solver++3m",
    ),
    "few steps (mnist-ect)": ("consistency", "lcm", "progressive"),
}
PATHS = {"DDPM chain": schedules.DDPM(), "SDE of the score": schedules.VE(0.002, 80.0)}
ECT, CHAINS = ("consistency", "lcm", "progressive"), ("lcm",)
# what a sampler can do nearest to NFE
ALLOWED = {
    **dict.fromkeys(("heun", "midpoint", "dpm2", "dpm2-ancestral", "dpm-solver++2s-ancestral"), (5, 9, 17, 33)),
    "dpm-solver++sde": (5, 9, 17, 33),
    "restart": (11, 17, 33),
    "pndm": (13, 16, 32),
    "consistency": (1, 2, 4, 8),
    "lcm": (1, 2, 4, 8),
    "progressive": (1, 2, 4, 8),
}
OPTIONS: dict[str, dict] = {"progressive": {"clip": False}}
TOLERANCES = (0.1, 0.03, 0.01, 0.003)  # rk45's, whose evaluations are counted
# Above this the picture ends: digits that nobody reads
CEILING = 1000.0


class Judge:
    """The classifier, the reference, and statistics that some samplers need."""

    def __init__(self, images: int):
        self.net, self.reference, self.images = measures.judging_classifier(), measures.load_reference()[0], images
        self.labels = natural_labels(images, self.reference["label_counts"])
        self.models = {name: fastdiff.load(name) for name in ("mnist-edm", "mnist-ect")}
        self.chain: dict[str, dict] = {}

    def model(self, name: str) -> Model:
        panel = next(p for p, names in PANELS.items() if name in names)
        base = self.models["mnist-ect" if name in ECT else "mnist-edm"]
        path = schedules.DDPM() if name in CHAINS else PATHS.get(panel)
        return base if path is None else dataclasses.replace(base, schedule=path, times={})

    def options(self, name: str) -> dict:
        """A sampler's own, with what it needs to know of the model."""
        if name in ("analytic-ddpm", "watson", "san-roman") and not self.chain:
            self.chain = statistics(self.model("ddpm"), self.models["mnist-edm"])
        return OPTIONS.get(name, {}) | self.chain.get(name, {})

    def fd(self, name: str, nfe: int | None, **options) -> tuple[float, float]:
        """Evaluations and FD-LeNet."""
        request = {"seeds": range(self.images), "labels": self.labels, "sampler": name, "progress": False, "batch_size": 100}
        made = run(self.model(name), nfe, **request, **self.options(name) | options)
        return float(made.evaluations), measures.judge(made.images, self.labels, self.net, self.reference)["fd"]


def statistics(chain: Model, teacher: Model) -> dict[str, dict]:
    """Gamma and E ||x0 - D||^2 at 50 steps of the chain, over images of the teacher, and a fitted noise level."""
    seeds = range(10_000, 10_064)
    images = fastdiff.sample(teacher, 35, seeds=seeds, progress=False)
    labels = torch.tensor([s % 10 for s in seeds])
    at = np.unique(np.round(np.linspace(0, 999, 50)))
    gamma = samplers.estimate_gamma(chain.denoiser, images, at, ops.seed_tensor(seeds), labels)
    ratio = chain.schedule.ratio(at)
    # D - x0 = (sigma / alpha) (n - eps), and for the posterior mean E ||n - eps||^2 = d - E ||eps||^2
    mse = ratio**2 * np.clip(1 - gamma, 1e-6, None) * images[0].numel()
    every = np.arange(1000)
    level = samplers.fit_level(chain.schedule, images, steps=600)
    return {
        "analytic-ddpm": {"gamma": np.interp(every, at, gamma)},
        "watson": {"mse": np.exp(np.interp(every, at, np.log(mse)))},
        "san-roman": {"level": level},
    }


def measure(numbers: dict, images: int) -> None:
    """Add what is missing, few evaluations first, and keep every point at once."""
    judge = Judge(images)
    numbers |= {"images": images, "floor": measures.floor(judge.reference, images)}
    numbers["models"] = {name: model.hash() for name, model in judge.models.items()}
    points = numbers.setdefault("points", {})
    for k in range(len(NFE)):
        for name in (name for names in PANELS.values() for name in names):
            grid = TOLERANCES if name == "rk45" else ALLOWED.get(name, NFE)
            if k >= len(grid) or len(points.setdefault(name, [])) > k:
                continue
            adaptive = name == "rk45"
            found = judge.fd(name, None, rtol=grid[k], atol=grid[k]) if adaptive else judge.fd(name, grid[k])
            points[name].append([round(v, 3) for v in found])
            print(f"{name:26}{found[0]:6.0f}{found[1]:10.2f}", flush=True)
            text = json.dumps(numbers, indent=1) + "\n"
            atomically(NUMBERS, lambda temporary, text=text: Path(temporary).write_text(text))


def draw(numbers: dict) -> None:
    """A panel for each family; the dashed line is the distance of as many real digits."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), sharey=True, layout="constrained")
    for axis, (panel, names) in zip(axes.flat, PANELS.items(), strict=True):
        for k, name in enumerate(names):
            points = np.array(numbers["points"].get(name, [])).reshape(-1, 2)
            line = {"marker": "osv^D"[k % 5], "markersize": 4, "linewidth": 1.3, "linestyle": "-" if k < 5 else "--"}
            axis.plot(points[:, 0], np.minimum(points[:, 1], CEILING), label=name, **line)
        axis.axhline(numbers["floor"], color="black", linewidth=0.8, linestyle=":")
        ticks = ALLOWED["consistency"] if "few" in panel else (4, 8, 16, 32, 64)
        axis.set(xscale="log", yscale="log", xticks=ticks, xticklabels=ticks, title=panel)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5, ncols=2 if len(names) > 6 else 1)
    for axis in axes[1]:
        axis.set_xlabel("network evaluations")
    for axis in axes[:, 0]:
        axis.set_ylabel("FD-LeNet")
    figure.suptitle(
        f"Quality against network evaluations, packaged models, {numbers['images']} digits a point (dotted: real ones)"
    )
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure what docs/samplers.json lacks")
    parser.add_argument("--images", type=int, default=IMAGES, help="digits a point, where nothing is measured yet")
    given = parser.parse_args()
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    if given.measure:
        measure(numbers, numbers.get("images", given.images))
    draw(numbers)


if __name__ == "__main__":
    main()

"""Draw docs/samplers.png: how far each deterministic sampler is from the exact solution of the packaged model's ODE.

python docs/draw_samplers.py [--images 16]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import fastdiff

SOLVERS = {
    "euler": {},
    "heun": {},
    "dpm2": {},
    "dpm-solver-3s": {},
    "dpm-solver++2m": {},
    "dpm-solver++3m": {},
    "deis": {},
    "lms": {},
    "ipndm": {},
    "unipc": {},
    "unipc-3": {"order": 3},
}
NFE = (5, 7, 9, 13, 19, 27)


def errors(images: int) -> dict[str, list[float]]:
    """Root mean square difference, per pixel, to Heun's method with 301 evaluations from the same noise."""
    seeds = range(images)
    exact = fastdiff.sample("mnist-edm", 301, seeds=seeds, sampler="heun", clip_output=False)

    def error(name: str, options: dict, nfe: int) -> float:
        got = fastdiff.sample("mnist-edm", nfe, seeds=seeds, sampler=name.removesuffix("-3"), clip_output=False, **options)
        return (got - exact).square().mean().sqrt().item()

    return {name: [error(name, options, nfe) for nfe in NFE] for name, options in SOLVERS.items()}


def draw(found: dict[str, list[float]], images: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for k, (name, values) in enumerate(found.items()):
        axes.plot(
            NFE, values, marker="osv^D"[k % 5], markersize=4, linewidth=1.2, linestyle="-" if k < 5 else "--", label=name
        )
    axes.set(
        xscale="log", yscale="log", xticks=NFE, xticklabels=NFE, xlabel="network evaluations", ylabel="RMS error per pixel"
    )
    axes.minorticks_off()
    axes.set_title(f"Distance to the ODE's solution, mnist-edm, {images} images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    count = parser.parse_args().images
    measured = errors(count)
    for name, values in measured.items():
        print(f"{name:16}", *(f"{value:.4f}" for value in values))
    draw(measured, count, Path(__file__).with_name("samplers.png"))

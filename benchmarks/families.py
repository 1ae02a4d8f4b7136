"""Every family of models trained alike on MNIST, and measured alike: which of two claims hold here, and under which sampler?

    python benchmarks/families.py --data mnist --out runs/families                 # about --minutes each, ten families
    python benchmarks/families.py --data mnist --out runs/families --report        # the tables of what is there already

Claim 1: DDPM has the lowest distance at an equal number of steps. Claim 2: consistency models match diffusion models in one
or two steps only with a perceptual loss. Both are asked under each sampler, for "steps" mean nothing without one.

A family is trained for --minutes of this machine (or --images), with one network, batch, order of data and average; then
drawn at each number of evaluations. Whatever was finished is not done again: stop it at any time, give the same command.
families.json and families.md are rewritten after every row. FD is the Frechet distance in features of the packaged LeNet;
the perceptual loss uses another classifier, trained here from another seed, so that nobody is judged by his teacher.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import claims
import harness

from fastdiff.metrics import Reference, evaluate, load_classifier, packaged_classifier
from fastdiff.model import Model, load
from fastdiff.request import make_plan
from fastdiff.training import PRESETS, ImageData, TrainConfig, Trainer, checks, load_mnist, perceptual
from fastdiff.training.classifier import accuracy, train_classifier
from fastdiff.training.report import sample_grid

# family -> its own sampler; all diffusion families are drawn by the two others as well.
OWN = {
    "edm": "heun",
    "ddpm": "ddpm",
    "vp": "euler-maruyama",
    "subvp": "euler-maruyama",
    "ve": "reverse-diffusion",
    "cd-l2": "consistency",
    "cd-huber": "consistency",
    "cd-perceptual": "consistency",
    "ct": "consistency",
    "ect": "consistency",
    "ct-perceptual": "consistency",
    "ict": "consistency",
    "flow": "euler",
    "iddpm": "ddpm",
}
USUAL = list(OWN)[:10]
COMMON = ("ddim", "unipc")
CALIBRATION = (4, 12)  # steps to warm up, steps that are timed
EPOCHS = 2  # of the perceptual classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and tables")
    parser.add_argument("--families", default=",".join(USUAL), help=f"of {', '.join(OWN)}")
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="training time of each family on this machine, as measured"
    )
    parser.add_argument("--images", type=int, help="training images of each family, in place of a time")
    parser.add_argument("--nfe", default="1,2,4,10,35", help="numbers of evaluations")
    parser.add_argument("--n", type=int, default=1000, help="images of each row")
    parser.add_argument("--teacher", help="EDM to distil and tune; by default the one trained here")
    parser.add_argument("--report", action="store_true", help="train and draw nothing, write the tables again")
    args = parser.parse_args()
    names = args.families.split(",")
    for name in names:
        if name not in OWN:
            parser.error(f"--families: {name!r} is not known; there are {', '.join(OWN)}")
    args.out.mkdir(parents=True, exist_ok=True)
    counts = [int(k) for k in args.nfe.split(",")]
    if not args.report:
        work(args, ["edm"] * (args.teacher is None and "edm" not in names and distils(names)) + names, counts)
    write(args.out)
    print((args.out / "families.md").read_text())


def distils(names: list[str]) -> bool:
    return any(PRESETS[f"mnist-{name}"].init for name in names)


def work(args: argparse.Namespace, names: list[str], counts: list[int]) -> None:
    """Train and measure family by family."""
    data = load_mnist(args.data)
    judge = load_classifier(str(packaged_classifier(data.shape)))
    reference = Reference.of(data.images, data.labels, judge)
    for name in sorted(names, key=lambda n: n != "edm"):  # the teacher first
        model = trained(args, name, data)
        rows(args.out, name, model, reference, counts, args.n)


def trained(args: argparse.Namespace, name: str, data: ImageData) -> Model:
    """The family's model, from its folder or from training that goes on where it was stopped."""
    out = args.out / name
    finished, plan = out / "model.safetensors", out / "plan.json"
    if finished.exists():
        return load(finished)
    preset = PRESETS[f"mnist-{name}"]
    teacher = load(args.teacher or args.out / "edm" / "model.safetensors") if preset.init else None
    given = {"init": teacher, "teacher": teacher if preset.loss == "cd" else None}
    if preset.options.get("metric") == "classifier":
        given["perceptual"] = perceptual.load("classifier", perceptual_classifier(args.out, args.data, data))
    out.mkdir(exist_ok=True)
    if plan.exists():
        config = TrainConfig.from_dict(json.loads(plan.read_text())["config"])
    else:
        config = dataclasses.replace(preset, bf16=checks.has_bf16(torch.device("cpu")))
        images = args.images or calibrated(config, data, given, args.minutes)
        config = dataclasses.replace(config, images=images)
        plan.write_text(json.dumps({"config": config.to_dict(), "minutes": args.minutes, "seconds": 0.0}))
    before = json.loads(plan.read_text())["seconds"]
    print(f"{name}: {config.images:,} images", flush=True)
    trainer = Trainer(
        config, data, out, report_every=0, info={"command": f"{Path(__file__).name} --families {name}"}, **given
    )
    start, done = time.perf_counter(), trainer.images
    try:
        model = trainer.train()
    finally:
        spent = before + time.perf_counter() - start
        plan.write_text(json.dumps({"config": config.to_dict(), "minutes": args.minutes, "seconds": spent}))
    print(f"{name}: {config.images - done:,} images in {(spent - before) / 60:.1f} minutes", flush=True)
    sample_grid(model, out / "samples.png")
    return model


def calibrated(config: TrainConfig, data: ImageData, given: dict, minutes: float) -> int:
    """Images that fit into the time, from the pace of a few steps in the middle of such a run."""
    warm, timed = CALIBRATION
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, folder, report_every=0, checkpoint_every=0, progress=False, **given)
        trainer.step = trainer.config.steps // 2  # where grids of consistency training are of middling size
        for _ in range(warm):
            trainer._one_step()
        start = time.perf_counter()
        for _ in range(timed):
            trainer._one_step()
        pace = timed * config.batch / (time.perf_counter() - start)
    return max(config.batch, int(0.97 * 60 * minutes * pace) // config.batch * config.batch)


def perceptual_classifier(out: Path, folder: Path, data: ImageData) -> Path:
    """A second classifier, of another seed than the judge."""
    path = out / "perceptual.safetensors"
    if not path.exists():
        net = train_classifier(
            data, EPOCHS, seed=1, say=lambda text: print(f"perceptual classifier: {text}", flush=True)
        ).rounded()
        net.info |= {"data": "MNIST, seed 1", "accuracy": accuracy(net, load_mnist(folder, train=False))}
        net.save(path)
    return path


def rows(out: Path, name: str, model: Model, reference: Reference, counts: list[int], n: int) -> None:
    """Measure what is missing of one family: every sampler at every number of evaluations that it can make."""
    path = out / name / "rows.json"
    found = json.loads(path.read_text()) if path.exists() else []
    samplers = [OWN[name]] if model.family == "consistency" else list(dict.fromkeys((OWN[name], *COMMON)))
    for sampler in samplers:
        for nfe in counts:
            if any((r["asked"], r["nfe"], r["n"]) == (sampler, nfe, n) for r in found):
                continue
            try:
                make_plan(model, nfe, sampler)
            except ValueError:
                continue  # Heun's method at an even number, say
            row = dataclasses.asdict(evaluate(model, reference, nfe, n, sampler=sampler))
            found.append({"family": name, "asked": sampler, "hash": model.hash()} | row)
            path.write_text(json.dumps(found, indent=1))
            print(f"{name:14} {sampler:18} {nfe:4} FD {row['fd']:8.3f}  agreement {row['agreement']:.3f}", flush=True)
            write(out)


def write(out: Path) -> None:
    """families.json and families.md from the rows that are there."""
    found, runs = [], {}
    for name in OWN:
        path, plan = out / name / "rows.json", out / name / "plan.json"
        found += json.loads(path.read_text()) if path.exists() else []
        if plan.exists():
            values = json.loads(plan.read_text())
            runs[name] = {"images": values["config"]["images"], "minutes": values["seconds"] / 60}
    header = harness.header()
    judged = claims.judge(found)
    (out / "families.json").write_text(json.dumps(header | {"runs": runs, "rows": found, "claims": judged}, indent=1) + "\n")
    (out / "families.md").write_text(claims.markdown(found, runs, judged, header))


if __name__ == "__main__":
    main()

"""`fastdiff times`."""

from pathlib import Path

import typer

from fastdiff.commands.eval_command import judge_of
from fastdiff.commands.sample_command import check_folder
from fastdiff.metrics import Reference, evaluate, load_classifier
from fastdiff.model import load
from fastdiff.samplers import search_times
from fastdiff.training import load_images

SEEDS = 10**6  # the search must not choose times that suit the samples a model is judged by


def run(
    name: str, nfe: int, data: Path, out: Path, n: int, levels: int, classifier: Path | None, device: str | None
) -> None:
    """Search, tell every candidate, and write the model with what was found."""
    check_folder(out)
    model = load(name, device) if device else load(name)
    if model.family != "consistency":
        raise ValueError(f"model: {name} is a {model.family} model; evaluation times are searched for consistency models")
    judge = load_classifier(judge_of(classifier, [(name, model)]))
    images = load_images(data, shape=model.shape)
    reference = Reference.of(images.images, images.labels, judge)

    def score(times: list[float]) -> float:
        row = evaluate(model, reference, nfe, n, first_seed=SEEDS, sampler="consistency", times=times)
        typer.echo(f"FD {row.fd:11.6g}   t = {', '.join(f'{t:.4g}' for t in times)}")
        return row.fd

    model.times[nfe] = search_times(score, model.schedule, nfe, levels=levels)
    model.save(out)
    typer.echo(f"{out}: {nfe} evaluations at t = {', '.join(f'{t:.4g}' for t in model.times[nfe])}")

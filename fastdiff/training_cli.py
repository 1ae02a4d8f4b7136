"""The subcommands of `fastdiff` that train and measure: options and help; what they do is in fastdiff.commands."""

from pathlib import Path
from typing import Annotated

import typer

DATA = "Folder or zip: MNIST, CIFAR-10 as torchvision lays them out, or images, with a sub-folder for each class."
OUT = "Folder of the run. The same command again continues a run that was stopped, and so does fastdiff resume."
Data = Annotated[Path, typer.Option(help=DATA)]
Out = Annotated[Path, typer.Option(help=OUT)]
Images = Annotated[int | None, typer.Option(help="Training images to see, in place of the preset's number.")]
Batch = Annotated[int | None, typer.Option(help="Images per step, all processes together.")]
Rate = Annotated[float | None, typer.Option(help="Largest learning rate.")]
Seed = Annotated[int | None, typer.Option(help="Everything random follows from it.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")]
Low = Annotated[bool | None, typer.Option(help="bfloat16 autocast. [default: where the machine has it]")]
Parts = Annotated[int | None, typer.Option(help="Compute each batch in this many parts, to save memory.")]
Compiled = Annotated[bool, typer.Option("--compile", help="The network through torch.compile.")]
Option = Annotated[list[str] | None, typer.Option(help="An option of the loss, q=256 or metric=huber; repeat it.")]
Size = Annotated[int | None, typer.Option(help="Cut and resize images of a folder or zip to this size.")]
Checkpoints = Annotated[int, typer.Option(help="Images between checkpoints.")]
Keep = Annotated[int, typer.Option(help="Checkpoints that stay, the newest included.")]
Reports = Annotated[int, typer.Option(help="Images between sample grids and loss curves; 0: none.")]
Distances = Annotated[int, typer.Option(help="Images between measurements of FD; the best model is kept. 0: none.")]
Judge = Annotated[Path | None, typer.Option(help="Classifier that measures FD. [default: the packaged one, for MNIST]")]
Board = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events as well.")]
Features = Annotated[str | None, typer.Option(help="Distance of consistency losses: lpips, or classifier (features).")]
Lpips = Annotated[Path | None, typer.Option(help="VGG-16 weights for lpips. [default: torchvision's cache]")]
Learned = Annotated[Path | None, typer.Option(help="Of train-classifier, for --perceptual classifier.")]


def train(
    preset: Annotated[str, typer.Option(help="One of those named above.")],
    data: Data,
    out: Out,
    init: Annotated[str | None, typer.Option(help="Checkpoint to start from; mnist-ect needs one of mnist-edm.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Diffusion model to distil, for the presets with cd.")] = None,
    images: Images = None,
    batch: Batch = None,
    lr: Rate = None,
    seed: Seed = None,
    p_mean: Annotated[float | None, typer.Option(help="EDM: mean of ln sigma in training. [default: -1.2]")] = None,
    p_std: Annotated[float | None, typer.Option(help="EDM: its standard deviation. [default: 1.2]")] = None,
    option: Option = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror every other image. [default: the preset's]")] = None,
    augment: Annotated[
        float | None, typer.Option(help="Probability of EDM's augmentations. [default: the preset's]")
    ] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Train without labels.")] = False,
    perceptual: Features = None,
    lpips_weights: Lpips = None,
    perceptual_classifier: Learned = None,
    device: Device = None,
    bf16: Low = None,
    accumulate: Parts = None,
    compile: Compiled = False,
    image_size: Size = None,
    checkpoint_every: Checkpoints = 25_600,
    keep: Keep = 1,
    report_every: Reports = 51_200,
    fd_every: Distances = 0,
    classifier: Judge = None,
    tensorboard: Board = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch MNIST or CIFAR-10 if it is missing.")] = False,
) -> None:
    """Train a model: DDPM, score SDE, EDM, flow matching, consistency training, distillation (cd) or tuning (ect).

    \b
    fastdiff train --preset mnist-edm --data mnist --out runs/edm
    fastdiff train --preset mnist-ect --init runs/edm/model.safetensors --data mnist --out runs/ect
    fastdiff train --preset cats64-edm --data cats.zip --unconditional --out runs/cats
    torchrun --nproc_per_node 2 -m fastdiff train --preset cifar10-ddpm --data cifar --out runs/ddpm

    Presets: mnist-ddpm, mnist-iddpm, mnist-vp, mnist-subvp, mnist-ve, mnist-edm, mnist-flow, mnist-ct, mnist-ct-perceptual,
    mnist-ict, mnist-cd-l2, mnist-cd-huber, mnist-cd-perceptual, mnist-ect; cifar10-ddpm, cifar10-edm-ddpmpp,
    cifar10-edm-ncsnpp, cifar10-cd-lpips, cifar10-ct-lpips, cifar10-ict, cifar10-ect, cifar10-quick-ddpm, cifar10-quick-edm,
    cifar10-quick-ect; imagenet64-adm; cats64-ddpm, cats64-edm, cats64-ect.

    The folder of the run holds model.safetensors (for fastdiff sample), loss.csv, loss.png, sample grids and state.pt.
    """
    from fastdiff.commands import train_command
    from fastdiff.commands.sample_command import parse_options

    options = parse_options(option or [])
    options |= {k: v for k, v in {"p_mean": p_mean, "p_std": p_std, "metric": perceptual}.items() if v is not None}
    train_command.train(
        preset,
        data,
        out,
        {"images": images, "batch": batch, "lr": lr, "seed": seed, "bf16": bf16, "flip": flip, "augment": augment,
         "accumulate": accumulate, "compile": compile or None},
        options,
        init=init,
        teacher=teacher,
        device=device,
        image_size=image_size,
        unconditional=unconditional,
        judge=classifier,
        perceptual_classifier=perceptual_classifier,
        lpips_weights=lpips_weights,
        fetch=download,
        showing={"checkpoint_every": checkpoint_every, "keep": keep, "report_every": report_every, "fd_every": fd_every,
                 "tensorboard": tensorboard},
    )  # fmt: skip


def distill(
    teacher: Annotated[str, typer.Option(help="Checkpoint or packaged name of a diffusion model.")],
    method: Annotated[str, typer.Option(help="cd: consistency distillation; ect: easy consistency tuning of its weights.")],
    data: Data,
    out: Out,
    preset: Annotated[str | None, typer.Option(help="Settings. [default: of the preset with the teacher's network]")] = None,
    images: Images = None,
    batch: Batch = None,
    lr: Rate = None,
    seed: Seed = None,
    option: Option = None,
    perceptual: Features = None,
    lpips_weights: Lpips = None,
    perceptual_classifier: Learned = None,
    device: Device = None,
    bf16: Low = None,
    accumulate: Parts = None,
    compile: Compiled = False,
    image_size: Size = None,
    checkpoint_every: Checkpoints = 25_600,
    keep: Keep = 1,
    report_every: Reports = 51_200,
    fd_every: Distances = 0,
    classifier: Judge = None,
    tensorboard: Board = False,
) -> None:
    """Make a few-step model of a diffusion model.

    \b
    fastdiff distill --teacher mnist-edm --method ect --data mnist --out runs/ect
    fastdiff distill --teacher mnist-edm --method cd --option metric=huber --data mnist --out runs/cd
    fastdiff distill --teacher mnist-edm --method cd --perceptual classifier --data mnist --out runs/cd-classifier
    """
    from fastdiff.commands import train_command
    from fastdiff.commands.sample_command import parse_options

    options = parse_options(option or []) | ({} if perceptual is None else {"metric": perceptual})
    train_command.distill(
        teacher,
        method,
        data,
        out,
        preset,
        {"images": images, "batch": batch, "lr": lr, "seed": seed, "bf16": bf16, "accumulate": accumulate,
         "compile": compile or None},
        options,
        device=device,
        image_size=image_size,
        judge=classifier,
        perceptual_classifier=perceptual_classifier,
        lpips_weights=lpips_weights,
        showing={"checkpoint_every": checkpoint_every, "keep": keep, "report_every": report_every, "fd_every": fd_every,
                 "tensorboard": tensorboard},
    )  # fmt: skip


def resume(
    run: Annotated[Path, typer.Argument(help="Folder of a run of fastdiff train or distill.")],
    data: Annotated[Path | None, typer.Option(help="Where the data set is now, if it was moved.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: as before]")] = None,
) -> None:
    """Continue a run that was stopped, from its last checkpoint; on a CPU it ends as if it had never stopped."""
    from fastdiff.commands import train_command

    train_command.resume(run, data, device)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints or packaged names.")],
    data: Annotated[Path, typer.Option(help="The data set that the models learned: a folder or zip, see fastdiff train.")],
    nfe: Annotated[str, typer.Option(help="Numbers of evaluations, with commas.")] = "1,2,4,35",
    n: Annotated[int, typer.Option(help="Images for each row.")] = 1000,
    first_seed: Annotated[int, typer.Option(help="Image i has seed FIRST_SEED + i.")] = 0,
    sampler: Annotated[str, typer.Option(help="One that `fastdiff samplers` lists, or auto.")] = "auto",
    option: Annotated[list[str] | None, typer.Option(help="A sampler's option, eta=0.5; repeat it.")] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Of fastdiff train-classifier. [default: the packaged one, for MNIST]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per network call.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: where the model is loaded]")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file to write the rows to as well.")] = None,
) -> None:
    """Measure models: distance to real images in a classifier's features (FD, no FID), label agreement, images per second.

    \b
    fastdiff eval mnist-ect mnist-edm --data mnist --nfe 1,2,4
    fastdiff eval runs/edm/model.safetensors --data mnist --nfe 35 --n 10000 --out edm.json

    The floor is the FD of as many real images. Evaluations are counted, images are made by seeds and not kept.
    """
    from fastdiff.commands import eval_command

    eval_command.run(models, data, nfe, n, first_seed, sampler, option, classifier, batch_size, device, dtype, out)


def times(
    model: Annotated[str, typer.Argument(help="Checkpoint or packaged name of a consistency model.")],
    data: Annotated[Path, typer.Option(help="The data set that the model learned: a folder or zip, see fastdiff train.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write, with the times in it.")],
    nfe: Annotated[int, typer.Option(help="Network evaluations per image.")] = 2,
    n: Annotated[int, typer.Option(help="Images for each candidate.")] = 500,
    levels: Annotated[int, typer.Option(help="Noise levels to choose from.")] = 24,
    classifier: Annotated[
        Path | None, typer.Option(help="Of fastdiff train-classifier. [default: the packaged one, for MNIST]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: where the model is loaded]")] = None,
) -> None:
    """Search good evaluation times for a consistency model, and store them in its checkpoint.

    \b
    fastdiff times mnist-ect --data mnist --nfe 2 --out better.safetensors
    fastdiff sample better.safetensors --nfe 2          now evaluates there

    Coordinate descent: the FD of fastdiff eval, of the same seeds at every candidate, decides.
    """
    from fastdiff.commands import times_command

    times_command.run(model, nfe, data, out, n, levels, classifier, device)


def train_classifier(
    data: Annotated[Path, typer.Option(help="Labelled data set: a folder or zip, see fastdiff train.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    epochs: Annotated[int, typer.Option(help="Times that every image is seen.")] = 6,
    seed: Annotated[int, typer.Option(help="Of weights and order; another seed gives a second, independent judge.")] = 0,
    rotations: Annotated[bool, typer.Option("--rotations", help="No labels: learn to tell quarter turns apart.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Cut and resize images of a folder or zip to this size.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")] = None,
) -> None:
    """Train a small classifier: the judge of fastdiff eval, or the perceptual distance of consistency training.

    \b
    fastdiff train-classifier --data cifar --out cifar-judge.safetensors
    """
    from fastdiff.commands import classifier_command

    classifier_command.run(data, out, epochs, seed, rotations, image_size, device)


def add(app: typer.Typer) -> None:
    """Give these commands to the application."""
    for command in (train, distill, resume, train_classifier):
        app.command(command.__name__.replace("_", "-"))(command)
    app.command()(times)
    app.command("eval")(evaluate)

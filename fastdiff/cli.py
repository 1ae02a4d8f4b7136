"""The `fastdiff` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastdiff import training_cli

app = typer.Typer(
    name="fastdiff",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
    help="Few-step images from diffusion and consistency models. Start with: fastdiff sample --n 64 --out digits.png",
)


@app.command()
def sample(
    model: Annotated[str | None, typer.Argument(help="Checkpoint or packaged name. [default: packaged MNIST]")] = None,
    nfe: Annotated[int | None, typer.Option(help="Network evaluations per image. [default: 2]")] = None,
    n: Annotated[int | None, typer.Option(help="Number of images, from fresh seeds. [default: 64]")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of --n, such as 0-63 or 1,5,9: one image each.")] = None,
    labels: Annotated[str | None, typer.Option(help="Classes, 7 or 0,1,2. [default: seed modulo classes]")] = None,
    out: Annotated[Path, typer.Option(help="PNG to write, a grid; or, with --seeds, a folder.")] = Path("samples.png"),
    like: Annotated[Path | None, typer.Option(help="Repeat the request stored in this PNG.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="One that `fastdiff samplers` lists. [default: the best for the model]")
    ] = None,
    times: Annotated[str | None, typer.Option(help="Where to evaluate, such as 80,0.821 (consistency, ddim, ddpm).")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="A sampler's option, eta=0.5 or spacing=logsnr; repeat it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per network call.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. [default: a GPU where there is one]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64: what the network computes in.")
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help="lossless: as dtype says. high: bfloat16, float32 sums. fast: what is opted in beyond. [default: lossless]"
        ),
    ] = None,
    compile: Annotated[
        str | None,
        typer.Option(
            help="auto: by a compiled program where that pays. off: the network as it is. fast: a program in any case. "
            "inductor: torch.compile. [default: auto; off for a folder]"
        ),
    ] = None,
) -> None:
    """Draw images and write them as one PNG.

    \b
    fastdiff sample --nfe 2 --n 64 --out digits.png     64 digits in two evaluations each
    fastdiff sample --labels 7 --seeds 0-15             sixteen sevens, always the same ones
    fastdiff sample mnist-edm --nfe 35                  the slow, careful teacher
    fastdiff sample --like digits.png --out again.png   the same images again
    fastdiff sample big.safetensors --quality high      bfloat16: faster, a little less exact
    fastdiff sample --seeds 0-49999 --out images        a file for each seed; run it again to go on after a stop
    torchrun --nproc_per_node 4 -m fastdiff sample --seeds 0-49999 --out images         the same by four processes
    """
    from fastdiff.commands import sample_command

    sample_command.run(
        model, nfe, n, seeds, labels, out, like, sampler, times, option, batch_size, device, dtype, quality, compile
    )


@app.command()
def samplers() -> None:
    """List the samplers: order of convergence, evaluations they can make, paper."""
    from fastdiff.commands import samplers_command

    samplers_command.run()


@app.command()
def average(
    models: Annotated[list[str], typer.Argument(help="Checkpoints of runs that went on from the same weights.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    dtype: Annotated[str, typer.Option(help="Of the stored weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Average the weights of several models into one; of a single model, write it again.

    \b
    fastdiff average runs/a/model.safetensors runs/b/model.safetensors --out both.safetensors
    fastdiff average runs/ect/model.safetensors --dtype float16 --out small.safetensors
    """
    from fastdiff.commands import average_command

    average_command.run(models, out, dtype)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A diffusers folder, an EDM pickle, an OpenAI or score_sde checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint to write.")],
    option: Annotated[list[str], typer.Option("--option", "-o", help="NAME=VALUE that the file does not say.")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Of the stored weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Turn another project's checkpoint into a fastdiff one. No code in it is run.

    \b
    fastdiff convert network-snapshot.pkl edm.safetensors
    fastdiff convert ddpm-cifar10-32 ddpm.safetensors
    fastdiff convert cd_imagenet64_lpips.pt cd.safetensors -o preset=cd_imagenet64
    fastdiff convert checkpoint_26.pth ncsnpp.safetensors -o preset=cifar10_ncsnpp_continuous
    """
    from fastdiff.commands import convert_command

    convert_command.run(source, target, option, dtype)


@app.command()
def info(model: Annotated[str | None, typer.Argument(help="Also describe this checkpoint.")] = None) -> None:
    """Show versions, devices, which implementation serves each op and why, and what a checkpoint holds."""
    from fastdiff.info import report

    typer.echo(report(model))


training_cli.add(app)


def main() -> None:
    """Entry point: errors of the request become one line on stderr and exit status 2, a stop by Ctrl-C 130."""
    from fastdiff.commands import REQUEST_ERRORS

    try:
        app()
    except REQUEST_ERRORS as error:
        typer.secho(f"fastdiff: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        typer.echo(f"fastdiff: {stop or 'stopped'}", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()

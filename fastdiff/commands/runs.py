"""What `fastdiff train`, `distill` and `resume` share: a run's request, which run.json keeps, and carrying it out."""

import dataclasses
import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import typer

import fastdiff
from fastdiff.atomic import atomically
from fastdiff.commands.average_command import chain
from fastdiff.metrics import load_classifier, packaged_classifier
from fastdiff.metrics.classifier import COMMAND
from fastdiff.model import Model, load
from fastdiff.training import ImageData, TrainConfig, Trainer, checks, load_images, perceptual
from fastdiff.training.distributed import joined
from fastdiff.training.losses.distances import PERCEPTUAL

RUN = "run.json"


@dataclasses.dataclass
class Request:
    """A run as it was asked for; everything that `fastdiff resume` needs besides the checkpoint."""

    config: TrainConfig
    data: Path
    out: Path
    device: str | None = None
    init: str | None = None
    teacher: str | None = None
    image_size: int | None = None
    download: str | None = None
    unconditional: bool = False
    judge: Path | None = None  # classifier that measures FD while training
    perceptual_classifier: Path | None = None
    lpips_weights: Path | None = None
    showing: dict[str, Any] = dataclasses.field(default_factory=dict)
    command: str = dataclasses.field(default_factory=lambda: shlex.join(["fastdiff", *sys.argv[1:]]))

    def save(self) -> None:
        """Write out/run.json."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "out"}
        plain = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in values.items()}
        plain |= {k: str(Path(v).resolve()) for k in ("init", "teacher") if (v := values[k]) and Path(v).exists()}
        text = json.dumps(plain | {"config": self.config.to_dict()}, indent=1, sort_keys=True) + "\n"

        def put(temporary: str) -> None:
            Path(temporary).write_text(text)

        self.out.mkdir(parents=True, exist_ok=True)
        atomically(self.out / RUN, put)

    @classmethod
    def load(cls, out: Path) -> "Request":
        """From out/run.json. Raises FileNotFoundError, ValueError saying what to do."""
        path = out / RUN
        if not path.is_file():
            raise FileNotFoundError(
                f"run: {out} holds no {RUN}; give the folder that fastdiff train or distill wrote to (--out)"
            )
        try:
            values = json.loads(path.read_text())
            paths = {k: Path(v) for k in ("data", "judge", "perceptual_classifier", "lpips_weights") if (v := values[k])}
            return cls(**(values | paths | {"config": TrainConfig.from_dict(values["config"]), "out": out}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"run: {path} is damaged ({error}); start the run again in another --out") from error


def execute(request: Request) -> None:
    """Check, load, train to the end."""
    config = request.config
    checks.check_config(config)
    network = config.network
    shape = (network.in_channels, network.resolution, network.resolution)
    images = load_images(request.data, size=request.image_size, download=request.download, seed=config.seed, shape=shape)
    if request.unconditional:
        images = ImageData(images.images, None, images.seed, images.about)
    init = None if request.init is None else load(request.init)
    teacher = None if request.teacher is None else load(request.teacher)
    with joined(checks.device_of(request.device)) as (group, device):
        showing = dict(request.showing)
        if showing.get("fd_every"):
            showing["judge"] = load_classifier(request.judge or _judge(images), device)
        distance = _perceptual(request, images, device)
        trainer = Trainer(
            config,
            images,
            request.out,
            init=init,
            teacher=teacher,
            perceptual=distance,
            device=device,
            group=group,
            info=_provenance(request, images, init, teacher) | ({} if distance is None else {"perceptual": distance.name}),
            **showing,
        )
        if group.leads:
            request.save()
            _announce(trainer, request)
        try:
            trainer.train()
        except KeyboardInterrupt as stop:  # the command line's library would leave its words out
            if group.leads:
                typer.echo(f"fastdiff: {stop}", err=True)
            raise typer.Exit(130) from stop
        if group.leads:
            typer.echo(
                f"wrote {request.out / 'model.safetensors'}; try: fastdiff sample {request.out / 'model.safetensors'}"
            )


def _announce(trainer: Trainer, request: Request) -> None:
    if trainer.showing.report_every and importlib.util.find_spec("matplotlib") is None:
        typer.echo("loss.png needs matplotlib (pip install -e '.[train]'); the loss itself is in loss.csv")
    if trainer.step:
        typer.echo(f"continuing at {trainer.images:,} of {request.config.images:,} images")


def _provenance(request: Request, images: ImageData, init: Model | None, teacher: Model | None) -> dict[str, Any]:
    parents = [m.info.get("command", f"({name})") for m, name in ((init, request.init), (teacher, request.teacher)) if m]
    name = images.about.get("name", request.data.name)
    licence = (
        "Apache-2.0 (weights); trained on MNIST, CC BY-SA 3.0" if name == "MNIST" else f"that of {name}, ask its source"
    )
    return {
        "command": chain([*parents, request.command]),
        "data": f"{name}, {len(images)} training images",
        "licence": licence,
        "versions": {"fastdiff": fastdiff.__version__, "torch": str(torch.__version__)},
    }


def _judge(images: ImageData) -> Path:
    packaged = packaged_classifier(images.shape)
    if packaged is None:
        raise ValueError(
            f"classifier: none is packaged for images {images.shape}; make one with {COMMAND} and give --classifier"
        )
    return packaged


def _perceptual(request: Request, images: ImageData, device: torch.device) -> perceptual.Perceptual | None:
    """The distance that the loss names; None where it names none."""
    metric = request.config.options.get("metric")
    if metric not in PERCEPTUAL:
        return None
    if metric == "classifier":
        return perceptual.load(metric, request.perceptual_classifier or _judge(images), device=device)
    return perceptual.load(metric, request.lpips_weights, device=device)

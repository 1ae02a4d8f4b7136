"""Model: a network with its schedule, prediction and provenance; `wrap`, `load` and `Model.save`."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff import checkpoints, schedules
from fastdiff.atomic import atomically
from fastdiff.checkpoints import CheckpointError, Convention, files
from fastdiff.checkpoints import to_diffusers as back
from fastdiff.denoiser import Denoiser, Prediction
from fastdiff.schedules import Schedule
from fastdiff.unet import UNet, UNetConfig

ASSETS = Path(__file__).parent / "assets"
FORMAT = 1
FAMILIES = ("diffusion", "consistency")
# Readers of files that hold more than a model, by the entry of their description: read(path, description, fields, device).
READERS: dict[str, Callable[..., "Model"]] = {}
# What building a network from values of a file may stumble over.
INCONSISTENT = (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass
class Model:
    """What `fastdiff.sample` needs: F(x, c_noise[, labels]), how to read it, and where it came from.

    family: "diffusion" (D is the posterior mean at every t) or "consistency" (D is the image at the end of the path).
    shape: (C, H, W) of one image; labels: number of classes, 0 for an unconditional model.
    times: recommended times of the evaluations for each nfe, {2: [80.0, 0.821]}.
    info: provenance, plain JSON values: licence, training command, data.
    convention: how the original of an imported network is called; `net` and `denoise` follow it.
    """

    network: Callable[..., Tensor]
    schedule: Schedule
    prediction: Prediction
    family: str = "diffusion"
    shape: tuple[int, int, int] | None = None
    labels: int = 0
    times: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    convention: Convention = dataclasses.field(default_factory=Convention)

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family: {self.family!r} is not known; use one of {', '.join(FAMILIES)}")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule: expected a fastdiff.schedules object such as EDM(), got {self.schedule!r}")

    @property
    def denoiser(self) -> Denoiser:
        return Denoiser(self.network, self.schedule, self.prediction)

    def net(
        self,
        x: Tensor,
        c_noise: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """The raw network as its original defines it: x [B, C, H, W], c_noise [B] or one for all -> its output.

        Labels are int64 [B] or one-hot [B, labels]. An imported network gets what its own code gives it (a noise level, an
        index) and returns what that returns.
        """
        about, extra = self.convention, _extra(labels, augment_labels)
        c = torch.as_tensor(c_noise, device=x.device).to(torch.float32).expand(len(x))
        level = c.reshape(-1, *[1] * (x.dim() - 1))
        y = self.network(2 * x - 1 if about.unit_range else x, c.log() if about.log_level else c, **extra)
        return y / level if about.divided else y

    def denoise(
        self,
        x: Tensor,
        t: Tensor | float,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """D(x, t), the estimate of the image, float32; t [B] or one for all in the schedule's own time.

        x and D are in the original's range of values, and so is the noise level where that is [0, 1].
        """
        extra = _extra(labels, augment_labels)
        if not self.convention.unit_range:
            return self.denoiser(x, t, **extra)
        return (self.denoiser(2 * x - 1, 2 * torch.as_tensor(t), **extra) + 1) / 2

    @property
    def device(self) -> torch.device:
        """Where the network's first weight is; the CPU for a plain callable."""
        weights = self.network.parameters() if isinstance(self.network, nn.Module) else iter(())
        return next(weights, torch.empty(0)).device

    @property
    def state(self) -> dict[str, Tensor]:
        """The network's weights; empty for a plain callable."""
        return dict(self.network.state_dict()) if isinstance(self.network, nn.Module) else {}

    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of description and weights."""
        digest = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for key, value in sorted(self.state.items()):
            digest.update(key.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _description(self) -> dict[str, Any]:
        network: dict[str, Any] = {"class": type(self.network).__name__}
        if isinstance(self.network, UNet):
            network["config"] = self.network.config.describe()
        description = {
            "format": FORMAT,
            "network": network,
            "schedule": schedules.to_dict(self.schedule),
            "prediction": self.prediction.describe(),
            "family": self.family,
            "shape": self.shape,
            "labels": self.labels,
            "times": {str(k): v for k, v in self.times.items()},
        }
        if self.convention != Convention():
            description["convention"] = self.convention.describe()
        return description

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write one .safetensors file, all of it or nothing; `dtype` (torch.float16, say) is that of the stored weights."""
        if not isinstance(self.network, UNet):
            raise TypeError(
                f"network: only a fastdiff.UNet can be saved with its architecture, this is a "
                f"{type(self.network).__name__}; save its weights with its own library"
            )
        state = {k: (v.to(dtype) if dtype and v.is_floating_point() else v).contiguous() for k, v in self.state.items()}
        metadata = {"fastdiff": json.dumps(self._description() | {"info": self.info})}
        atomically(path, lambda temporary: save_file(state, temporary, metadata=metadata))


def _extra(labels: Tensor | None, augment_labels: Tensor | None) -> dict[str, Tensor]:
    """What a network is called with beside x and c_noise."""
    given = {"labels": labels, "augment_labels": augment_labels}
    return {name: value for name, value in given.items() if value is not None}


def wrap(
    network: Callable[..., Tensor],
    *,
    schedule: Schedule,
    prediction: str | Prediction = "eps",
    shape: tuple[int, int, int] | None = None,
    labels: int = 0,
    family: str = "diffusion",
    precondition: bool = False,
) -> Model:
    """Make any callable net(x, t) or net(x, t, labels) a model.

    Args:
        network: gets x [B, C, H, W] and t [B] in the schedule's own time; returns [B, C, H, W].
        schedule: how its training data was noised, an object of `fastdiff.schedules`.
        prediction: what it returns: eps, x0, v, score, flow, edm or consistency (see `Prediction`).
        shape: (C, H, W) of an image; taken from a `fastdiff.UNet`.
        labels: number of classes; 0 when it takes no labels.
        family: "diffusion" or "consistency".
        precondition: the network gets c_in x and c_noise in place of x and t.

    Raises: TypeError, ValueError naming the argument.
    """
    if not callable(network):
        raise TypeError(f"network: {network!r} cannot be called; pass a function or torch.nn.Module net(x, t)")
    if isinstance(prediction, str):
        prediction = Prediction(prediction)
    if isinstance(network, UNet):
        config = network.config
        shape, labels = shape or (config.in_channels, config.resolution, config.resolution), config.labels
    prediction = dataclasses.replace(prediction, raw=not precondition)
    return Model(network, schedule, prediction, family, shape, labels)


def from_state_dict(
    state: Mapping[str, Tensor],
    family: str,
    class_name: str | None = None,
    **config: Any,
) -> Model:
    """A model from another project's weights, which stay as they are.

    Args:
        state: the original's state dict; weights of any floating type become float32.
        family: "diffusers", "edm", "openai" or "score_sde".
        class_name: the original's class; by default UNet2DModel, EDMPrecond, UNetModel, NCSNpp.
        config: the arguments it was built with, under its own names. OpenAI's networks need none of them where shapes tell
            all but `image_size`; `use_new_attention_order` says what shapes cannot.

    Raises: ValueError for an unknown family; CheckpointError that names what cannot be read, is missing, unexpected or of
    another shape.
    """
    network, about = checkpoints.convert({**state}, family, class_name, config, "state: the weights")
    return imported(network, about)


def to_diffusers(model: Model, folder: str | os.PathLike) -> None:
    """Write the folder of a diffusers DDPMPipeline: its UNet2DModel and its scheduler.

    Raises: FileExistsError; CheckpointError naming what UNet2DModel or DDPMScheduler cannot express.
    """
    if not isinstance(model.network, UNet):
        raise TypeError(f"model: only a fastdiff.UNet becomes a UNet2DModel, this is a {type(model.network).__name__}")
    back.write(model.network, model.schedule, model.prediction, Path(folder))


def imported(network: UNet, about: checkpoints.About) -> Model:
    """The model of a network from elsewhere."""
    config = network.config
    shape = (config.in_channels, config.resolution, config.resolution)
    return Model(
        network,
        about.schedule,
        about.prediction,
        about.family,
        shape,
        config.labels,
        info=about.info,
        convention=about.convention,
    )


def packaged(nfe: int | None = None) -> Path:
    """The packaged MNIST model: the consistency model up to 8 evaluations, its EDM teacher beyond."""
    return ASSETS / ("mnist-edm.safetensors" if nfe is not None and nfe > 8 else "mnist-ect.safetensors")


def load(source: Any, device: str | torch.device = "cpu", **config: Any) -> Model:
    """Read a model from a checkpoint of ours or of another project, told by its content, or pass a `Model` through.

    Args:
        source: a path, the name of a packaged model ("mnist-ect", "mnist-edm"), or a diffusers UNet2DModel or unconditional
            pipeline in memory. Files: ours, a folder of such a diffusers model or pipeline, EDM's pickles, state dicts of
            OpenAI's diffusion models, checkpoints of score_sde (the moving averages are taken). No code in a file is run.
        device: where the weights go.
        config: what a file of another project does not say, see `from_state_dict`; for OpenAI's and score_sde's also
            `preset`, the name of a published model.

    Raises: FileNotFoundError; CheckpointError for a truncated, foreign or inconsistent file, or weights that are not
    finite; TypeError for anything else, a network without its schedule in particular.
    """
    foreign = None if isinstance(source, Model) else files.of_object(source)
    if config and (isinstance(source, Model) or foreign is not None):
        raise CheckpointError(f"model: a {type(source).__name__} says itself what it is; leave {', '.join(config)} out")
    if isinstance(source, Model):
        return source
    if foreign is None:
        path = _path(source)
        found = files.read(path, config)
        if isinstance(found, files.Native):
            return _build(path, found, device)
        foreign, what = found, f"in {path}"
    else:
        what = f"of the {type(source).__name__}"
    try:
        network, about = checkpoints.convert(
            foreign.state, foreign.family, foreign.class_name, foreign.config, f"model: the weights {what}"
        )
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(
            text if text.startswith("model: ") else f"model: what is {what} is not read: {text}"
        ) from error
    except INCONSISTENT as error:
        raise CheckpointError(f"model: the arguments {what} are inconsistent: {str(error)[:200]}") from error
    return imported(network.to(device), about)


def _path(source: Any) -> Path:
    if isinstance(source, nn.Module) or callable(source):
        raise TypeError(
            f"model: a {type(source).__name__} alone does not say how it was trained; wrap it with its schedule and "
            f"prediction: fastdiff.wrap(net, schedule=fastdiff.schedules.EDM(), prediction='eps', shape=(3, 32, 32))"
        )
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"model: expected a path, a packaged name, a Model or None, got {type(source).__name__}")
    path = Path(source)
    if not path.exists() and (ASSETS / f"{source}.safetensors").is_file():
        path = ASSETS / f"{source}.safetensors"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in ASSETS.glob("*.safetensors")))
        raise FileNotFoundError(f"model: {source} is no file; give the path of a checkpoint or a packaged name ({names})")
    return path


def _build(path: Path, found: files.Native, device: str | torch.device) -> Model:
    """A model of our own file."""
    try:
        description = json.loads(found.description)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"model: the description in {path} is damaged ({error}); copy it again") from error
    version = description.get("format") if isinstance(description, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"model: {path} has format {version}, this fastdiff reads {FORMAT}; update fastdiff")
    try:
        about = {
            "schedule": schedules.from_dict(description["schedule"]),
            "prediction": Prediction.from_dict(description["prediction"]),
            "family": description["family"],
            "shape": tuple(description["shape"]),
            "labels": description["labels"],
            "times": {int(k): v for k, v in description["times"].items()},
            "convention": Convention(**description.get("convention", {})),
            "info": description.get("info", {}),
        }
        for entry in READERS.keys() & description.keys():
            return READERS[entry](path, description, about, device)
        network = checkpoints.build(UNetConfig(**description["network"]["config"]))
    except INCONSISTENT as error:
        raise CheckpointError(f"model: the description in {path} is incomplete or inconsistent: {error!r}") from error
    checkpoints.fill(network, checkpoints.Layout(), found.state, f"model: the weights in {path}")
    return Model(network.to(device), **about)

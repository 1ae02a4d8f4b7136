"""What a training run is, as plain data."""

import dataclasses
from typing import Any

from fastdiff import schedules
from fastdiff.denoiser import Prediction
from fastdiff.schedules import Schedule
from fastdiff.training.losses import LOSSES
from fastdiff.unet import UNetConfig

OPTIMIZERS = ("adam", "adamw", "radam")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. Two runs with equal configs and data end with equal weights, bit for bit on one CPU."""

    loss: str  # a name of fastdiff.training.losses
    network: UNetConfig
    schedule: Schedule
    prediction: Prediction
    images: int  # length of the run, in training images seen
    batch: int = 128  # images of a step, all processes together
    accumulate: int = 1  # parts that a process' share of the batch is computed in, to save memory
    lr: float = 1e-3
    optimizer: str = "adam"  # one of OPTIMIZERS
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 10_000  # images over which the learning rate rises from 0
    decay: bool = True  # let the learning rate fall to 0 along a half cosine
    clip: float = 1.0  # largest gradient norm; 0: any
    ema: tuple[int, ...] = (500_000,)  # half-lives of the averages in images; the first one makes model.safetensors
    ema_rampup: float = 0.05  # early on a half-life is this share of the images seen; 0: never
    flip: bool = False  # mirror every other image
    augment: float = 0.0  # probability of each of EDM's non-leaky augmentations; the network is told (augment=9)
    bf16: bool = True  # autocast, where the device has it
    compile: bool = False  # the network through torch.compile
    seed: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the loss, where not its defaults
    times: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # recommended, stored with the model
    init: str | None = None  # preset that training starts from

    def __post_init__(self):
        for name in ("betas", "ema"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def steps(self) -> int:
        return -(-self.images // self.batch)

    @property
    def family(self) -> str:
        return LOSSES[self.loss].family

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"betas": list(self.betas), "ema": list(self.ema), "options": dict(self.options)}
        values["network"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.network.describe().items()}
        values["schedule"] = schedules.to_dict(self.schedule)
        values["prediction"] = self.prediction.describe()
        values["times"] = {str(k): v for k, v in self.times.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The run that `to_dict` described. Raises ValueError where it does not describe one."""
        try:
            plain = dict(values)
            plain["network"] = UNetConfig(**values["network"])
            plain["schedule"] = schedules.from_dict(values["schedule"])
            plain["prediction"] = Prediction.from_dict(values["prediction"])
            plain["times"] = {int(k): v for k, v in values["times"].items()}
            return cls(**plain)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"config: it describes no run of this version ({error!r})") from error


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """ "network.channels: 16 there, 8 now" for every plain value that differs."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} now")
    return found

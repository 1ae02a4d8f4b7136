"""What a training run is, as plain data, and the presets."""

import dataclasses
from typing import Any

from fastdiff import schedules
from fastdiff.denoiser import Prediction
from fastdiff.schedules import DDPM, EDM, Schedule
from fastdiff.training.losses import LOSSES
from fastdiff.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. Two runs with equal configs and data end with equal weights, bit for bit on one CPU."""

    loss: str  # a name of fastdiff.training.losses
    network: UNetConfig
    schedule: Schedule
    prediction: Prediction
    images: int  # length of the run, in training images seen
    batch: int = 128
    lr: float = 1e-3
    optimizer: str = "adam"  # "adam" or "radam"
    warmup: int = 10_000  # images over which the learning rate rises from 0
    decay: bool = True  # let the learning rate fall to 0 along a half cosine
    clip: float = 1.0  # largest gradient norm
    ema_halflife: int = 500_000  # in images; early on 5 % of the images seen
    bf16: bool = True  # autocast, where the device has it
    seed: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the loss, where not its defaults
    times: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # recommended, stored with the model
    init: str | None = None  # preset or checkpoint that training starts from

    @property
    def steps(self) -> int:
        return -(-self.images // self.batch)

    @property
    def family(self) -> str:
        return LOSSES[self.loss].family

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        values["schedule"] = schedules.to_dict(self.schedule)
        values["times"] = {str(k): v for k, v in self.times.items()}
        return values


# Made for two CPU cores: 28x28 needs no padding, attention sits where it is cheap, and most convolutions run at 14x14.
_MNIST = UNetConfig(
    resolution=28,
    in_channels=1,
    out_channels=1,
    channels=16,
    multipliers=(1, 3, 4),
    blocks=1,
    embedding_multiplier=8,
    attention=(7,),
    dropout=0.0,
    groups=8,
    conditioning="scale_shift",
    labels=10,
)

PRESETS: dict[str, TrainConfig] = {
    "mnist-ddpm": TrainConfig("ddpm", _MNIST, DDPM(), Prediction("eps"), images=360_000, lr=2e-3),
    "mnist-edm": TrainConfig("edm", _MNIST, EDM(), Prediction("edm"), images=360_000, lr=2e-3),
    "mnist-ect": TrainConfig(
        "ect",
        _MNIST,
        EDM(),
        Prediction("edm"),
        images=300_000,
        lr=1e-3,
        optimizer="radam",
        times={1: [80.0], 2: [80.0, 1.4], 4: [80.0, 7.0, 1.2, 1.0]},
        init="mnist-edm",
    ),
}

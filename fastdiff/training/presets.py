"""Training runs by name: published settings, and what two CPU cores or one GPU can do in minutes."""

import dataclasses
import difflib
import math
from typing import Any

from fastdiff.denoiser import Prediction
from fastdiff.schedules import DDPM, EDM, VE, VP, Flow, SubVP
from fastdiff.training.config import TrainConfig
from fastdiff.unet import UNetConfig


def halflife(decay: float, batch: int) -> int:
    """The half-life in images of an average that keeps `decay` of itself at each step."""
    return round(batch * math.log(2) / -math.log(decay))


# Made for two CPU cores: 28x28 needs no padding, attention sits where it is cheap, and most convolutions run at 14x14.
MNIST = UNetConfig(
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
# 14.5 M and 9 M weights: minutes to an hour on one GPU.
CIFAR_QUICK = UNetConfig(channels=96, multipliers=(1, 2, 2), dropout=0.1, conditioning="scale_shift")
CATS = UNetConfig(resolution=64, channels=64, multipliers=(1, 2, 2, 2), dropout=0.1, conditioning="scale_shift")
DDPMPP, NCSNPP = UNetConfig.ddpmpp(augment=9), UNetConfig.ncsnpp(augment=9)

EPS_VP, FLOW = Prediction("eps", time_scale=999.0), Prediction("flow", time_scale=999.0)
CONSISTENCY = Prediction("consistency")
TIMES = {1: [80.0], 2: [80.0, 1.4], 4: [80.0, 7.0, 1.2, 1.0]}

_mnist = TrainConfig("edm", MNIST, EDM(), Prediction("edm"), images=360_000, lr=2e-3)
_mnist_cm = dataclasses.replace(_mnist, prediction=CONSISTENCY, images=300_000, lr=1e-3, optimizer="radam", times=TIMES)
_mnist_cd = dataclasses.replace(_mnist_cm, loss="cd", init="mnist-edm")
_published: dict[str, Any] = {"betas": (0.9, 0.999), "decay": False}
_edm = TrainConfig(
    "edm", DDPMPP, EDM(), Prediction("edm"), images=200_000_000, batch=512, lr=1e-3, warmup=10_000_000, clip=0.0,
    augment=0.12, **_published,
)  # fmt: skip
_consistency = TrainConfig(
    "cd", NCSNPP, EDM(), CONSISTENCY, images=800_000 * 512, batch=512, lr=4e-4, optimizer="radam", warmup=0, clip=0.0,
    ema=(halflife(0.9999, 512),), ema_rampup=0.0, times={1: [80.0], 2: [80.0, 0.821]}, **_published,
)  # fmt: skip


def _with(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, **changes)


PRESETS: dict[str, TrainConfig] = {
    "mnist-ddpm": _with(_mnist, loss="ddpm", schedule=DDPM(), prediction=Prediction("eps")),
    "mnist-iddpm": _with(
        _mnist, loss="iddpm", network=dataclasses.replace(MNIST, out_channels=2), schedule=DDPM(law="cosine"),
        prediction=Prediction("eps", learned_variance=True),
    ),
    "mnist-vp": _with(_mnist, loss="sde", schedule=VP(), prediction=EPS_VP),
    "mnist-subvp": _with(_mnist, loss="sde", schedule=SubVP(), prediction=EPS_VP),
    "mnist-ve": _with(_mnist, loss="sde", schedule=VE(), prediction=Prediction("ve")),
    "mnist-edm": _mnist,
    "mnist-flow": _with(_mnist, loss="flow", schedule=Flow(), prediction=FLOW),
    # Minutes, not days: what the network knows has few levels to cross, and no target lags behind.
    "mnist-ct": _with(_mnist_cm, loss="ct", options={"s1": 18, "mu0": 0.0}),
    "mnist-ct-perceptual": _with(_mnist_cm, loss="ct", options={"metric": "classifier", "s1": 18, "mu0": 0.0}),
    "mnist-ict": _with(_mnist_cm, loss="ict", options={"s1": 160}),
    "mnist-cd-l2": _mnist_cd,
    "mnist-cd-huber": _with(_mnist_cd, options={"metric": "huber"}),
    "mnist-cd-perceptual": _with(_mnist_cd, options={"metric": "classifier"}),
    "mnist-ect": _with(_mnist_cm, loss="ect", prediction=Prediction("edm"), init="mnist-edm"),
    # Ho et al. 2020
    "cifar10-ddpm": TrainConfig(
        "ddpm", UNetConfig(), DDPM(), Prediction("eps"), images=800_000 * 128, lr=2e-4, warmup=5000 * 128,
        ema=(halflife(0.9999, 128),), ema_rampup=0.0, flip=True, **_published,
    ),
    # Nichol and Dhariwal 2021; Dhariwal and Nichol 2021, table 11
    "imagenet64-adm": TrainConfig(
        "iddpm", UNetConfig.adm(out_channels=6), DDPM(law="cosine"), Prediction("eps", learned_variance=True),
        images=540_000 * 2048, batch=2048, lr=3e-4, optimizer="adamw", warmup=0, clip=0.0, ema=(halflife(0.9999, 2048),),
        ema_rampup=0.0, flip=True, **_published,
    ),
    # Karras et al. 2022, VP and VE configurations
    "cifar10-edm-ddpmpp": _edm,
    "cifar10-edm-ncsnpp": _with(_edm, network=NCSNPP),
    # Song et al. 2023: the networks of EDM's weights, no dropout
    "cifar10-cd-lpips": _with(
        _consistency, network=dataclasses.replace(NCSNPP, dropout=0.0), options={"metric": "lpips"},
        init="cifar10-edm-ncsnpp",
    ),
    "cifar10-ct-lpips": _with(
        _consistency, loss="ct", network=dataclasses.replace(NCSNPP, dropout=0.0), options={"metric": "lpips"}
    ),
    # Song and Dhariwal 2024
    "cifar10-ict": _with(
        _consistency, loss="ict", network=dataclasses.replace(NCSNPP, dropout=0.3), images=400_000 * 1024, batch=1024,
        lr=1e-4, ema=(halflife(0.99993, 1024),),
    ),
    # Geng et al. 2024
    "cifar10-ect": _with(
        _consistency, loss="ect", prediction=Prediction("edm"), network=dataclasses.replace(DDPMPP, dropout=0.2),
        images=200_000 * 128, batch=128, lr=1e-4, ema=(halflife(0.9999, 128),), init="cifar10-edm-ddpmpp",
    ),
    # One GPU, minutes to an hour
    "cifar10-quick-ddpm": TrainConfig(
        "ddpm", CIFAR_QUICK, DDPM(), Prediction("eps"), images=10_000_000, batch=256, lr=4e-4, warmup=100_000, flip=True
    ),
    "cifar10-quick-edm": TrainConfig(
        "edm", CIFAR_QUICK, EDM(), Prediction("edm"), images=10_000_000, batch=256, lr=1e-3, warmup=100_000, flip=True
    ),
    "cifar10-quick-ect": _with(
        _consistency, loss="ect", prediction=Prediction("edm"), network=dataclasses.replace(CIFAR_QUICK, dropout=0.2),
        images=4_000_000, batch=256, lr=2e-4, decay=True, ema=(500_000,), ema_rampup=0.05, flip=True,
        init="cifar10-quick-edm",
    ),
    "cats64-ddpm": TrainConfig(
        "ddpm", CATS, DDPM(), Prediction("eps"), images=5_000_000, batch=128, lr=4e-4, warmup=100_000, flip=True
    ),
    "cats64-edm": TrainConfig(
        "edm", CATS, EDM(), Prediction("edm"), images=5_000_000, batch=128, lr=1e-3, warmup=100_000, flip=True
    ),
    "cats64-ect": _with(
        _consistency, loss="ect", prediction=Prediction("edm"), network=dataclasses.replace(CATS, dropout=0.2),
        images=2_000_000, batch=128, lr=2e-4, decay=True, ema=(500_000,), ema_rampup=0.05, flip=True, init="cats64-edm",
    ),
}  # fmt: skip


def find_preset(name: str) -> TrainConfig:
    """A preset by name; ValueError names the nearest one."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1, 0)
        raise ValueError(f"preset: {name!r} is not known; did you mean {close[0]}? There are {', '.join(PRESETS)}")
    return PRESETS[name]


def data_of(name: str) -> str | None:
    """The data set a preset is about, where it can be fetched: "mnist" or "cifar10"."""
    return next((kind for kind in ("mnist", "cifar10") if name.startswith(kind)), None)

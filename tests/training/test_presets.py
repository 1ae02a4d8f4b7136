"""Presets: whole descriptions of runs, with the published numbers where they are named after a paper."""

import json
import math

import pytest
import torch

import fastdiff
from fastdiff.training import PRESETS, TrainConfig, checks, find_preset, losses
from fastdiff.training.presets import halflife


@pytest.mark.parametrize("name", PRESETS)
def test_whole(name):
    """It survives JSON, passes the checks, and its network and loss can be made."""
    config = PRESETS[name]
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    checks.check_config(config)
    with torch.device("meta"):
        network = fastdiff.UNet(config.network)
    kind = losses.LOSSES[config.loss]
    teacher = fastdiff.denoiser.Denoiser(network, *fastdiff.denoiser.edm()) if kind.needs_teacher else None
    perceptual = (
        (lambda a, b: (a - b).flatten(1).mean(1)) if config.options.get("metric") in ("lpips", "classifier") else None
    )
    losses.create(config.loss, config.schedule, config.prediction, config.options, teacher=teacher, perceptual=perceptual)
    for nfe, times in config.times.items():
        assert len(times) == nfe and list(config.schedule.check(times)) == sorted(times, reverse=True)
    if config.init:  # can start from what it says it starts from
        assert {**PRESETS[config.init].network.describe(), "dropout": 0} == {**config.network.describe(), "dropout": 0}


def parameters(name):
    with torch.device("meta"):
        return sum(p.numel() for p in fastdiff.UNet(PRESETS[name].network).parameters())


def test_published_numbers():
    assert parameters("cifar10-ddpm") == 35_746_307
    assert parameters("cifar10-edm-ddpmpp") == 55_733_891
    ddpm, edm = PRESETS["cifar10-ddpm"], PRESETS["cifar10-edm-ddpmpp"]
    assert (ddpm.batch, ddpm.lr, ddpm.steps, ddpm.clip, ddpm.flip) == (128, 2e-4, 800_000, 1.0, True)
    assert (edm.batch, edm.lr, edm.images, edm.augment, edm.ema) == (512, 1e-3, 200_000_000, 0.12, (500_000,))


def test_halflife():
    """A decay per step, as papers give it, and the half-life in images are the same average."""
    for decay, batch in ((0.9999, 128), (0.99993, 1024)):
        assert 0.5 ** (batch / halflife(decay, batch)) == pytest.approx(decay, rel=1e-9)
    assert halflife(0.9999, 128) == round(128 * math.log(2) / 1.00005e-4)


def test_misspelt():
    with pytest.raises(
        ValueError, match=r"preset: 'cifar10-dpm' is not known; did you mean cifar10-ddpm\? There are mnist-ddpm, "
    ):
        find_preset("cifar10-dpm")


def test_described_wrongly():
    values = PRESETS["mnist-edm"].to_dict()
    for change in ({"schedule": {"name": "edn"}}, {"speed": 3}, {"network": {"chanels": 3}}):
        with pytest.raises(ValueError, match=r"config: it describes|schedule: .edn"):
            TrainConfig.from_dict(values | change)

"""The trainer: what it minimises goes down, averages and rates are the formulas, and a run can be cut anywhere."""

import csv
import dataclasses
import math
import os

import pytest
import torch
from toy_training import trainer, weights

import fastdiff
from fastdiff.training import ImageData
from fastdiff.training.trainer import TrainingError


@pytest.mark.parametrize(("loss", "factor"), [("edm", 0.75), ("ddpm", 0.4), ("ect", 0.92)])
def test_loss_goes_down(loss, factor, toy_config, toy_data, tmp_path):
    """Two Gaussians, 80 steps: the last 20 losses against the first 20. Measured 0.62, 0.17 and 0.84.

    ECT's falls least: it is the distance, not its square, and times near 0, where nothing can be learned, weigh most.
    """
    # stages=1: ECT's target, and so its loss, would change from stage to stage
    config = toy_config(loss, images=1280, options={"stages": 1, "q": 1.0} if loss == "ect" else {})
    t = trainer(config, toy_data, tmp_path)
    t.train()
    losses = [row[2] for row in t.reporter.log.rows]
    assert sum(losses[-20:]) <= factor * sum(losses[:20])


def test_ect_starts_from_a_teacher(toy_config, toy_data, tmp_path):
    teacher = trainer(toy_config("edm"), toy_data, tmp_path / "edm").train()
    t = trainer(toy_config("ect", optimizer="radam"), toy_data, tmp_path / "ect", init=teacher)
    assert all(torch.equal(v, teacher.state[k]) for k, v in t.network.state_dict().items())
    model = t.train()
    assert model.family == "consistency" and teacher.family == "diffusion"
    other = dataclasses.replace(t.config, network=dataclasses.replace(t.config.network, channels=16))
    with pytest.raises(
        ValueError,
        match=r"init: its network .* to be trained \(channels: 8 there, 16 here\); use a checkpoint of the same arch",
    ):
        trainer(other, toy_data, tmp_path / "other", init=teacher)


def test_written_files(toy_config, toy_data, tmp_path):
    t = trainer(toy_config(times={2: [80.0, 0.8]}), toy_data, tmp_path, report_every=64, info={"licence": "mine"})
    model = t.train()
    names = set(os.listdir(tmp_path))
    assert {"state.pt", "model.safetensors", "loss.csv", "samples-00000064.png", "samples-00000128.png"} <= names
    assert not [n for n in names if n.endswith(".part")]
    again = fastdiff.load(tmp_path / "model.safetensors")
    assert again.hash() == model.hash() and again.info["licence"] == "mine" and again.info["images"] == 128
    assert again.info["training"]["loss"] == "edm" and again.times == {2: [80.0, 0.8]} and again.labels == 2
    with open(tmp_path / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, 9)) and [int(r["images"]) for r in rows] == list(
        range(16, 129, 16)
    )
    assert fastdiff.sample(again, 3, seeds=[0]).shape == (1, 1, 8, 8)


def test_learning_rate(toy_config, toy_data, tmp_path):
    """Linear warm-up over `warmup` images, half a cosine over the run; without decay it stays."""
    t = trainer(toy_config(images=1600, batch=16, warmup=160, lr=1.0), toy_data, tmp_path)
    got = []
    for t.step in range(100):
        got.append(t._lr(t.images))
    expected = [min(1.0, (i + 1) / 10) * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert got == pytest.approx(expected, rel=1e-12)
    t.config = dataclasses.replace(t.config, decay=False)
    assert t._lr(1000) == 1.0 and t._lr(0) == pytest.approx(0.1)


def test_averages(toy_config, toy_data, tmp_path):
    """e <- e + (1 - 2^(-batch / h)) (p - e), h each half-life or 5 % of the images seen, after every step; all at once."""
    t = trainer(toy_config(ema=(4, 1000), ema_rampup=0.05), toy_data, tmp_path)
    expected = [[e.double().clone() for e in weights] for weights in t.ema.weights]
    for step in range(1, 8):
        t._one_step()
        for h, (k, averaged) in zip((4, 1000), enumerate(t.ema.weights), strict=True):
            keep = 0.5 ** (16 / min(h, 0.05 * 16 * step))
            parameters = list(t.network.parameters())
            expected[k] = [keep * e + (1 - keep) * p.detach().double() for e, p in zip(expected[k], parameters, strict=True)]
            for e, x in zip(averaged, expected[k], strict=True):
                torch.testing.assert_close(e.double(), x, rtol=1e-5, atol=1e-7)
    for which in (0, 1):
        own = t.model(which).network.parameters()
        assert all(torch.equal(p, e) for p, e in zip(own, t.ema.weights[which], strict=True))


def test_every_average_becomes_a_model(toy_config, toy_data, tmp_path):
    trainer(toy_config(ema=(50_000, 10), ema_rampup=0.0, images=48), toy_data, tmp_path).train()
    slow, fast = (fastdiff.load(tmp_path / f"{name}.safetensors") for name in ("model", "model-ema-10"))
    assert slow.info["ema"] == 50_000 and fast.info["ema"] == 10 and slow.hash() != fast.hash()


def test_accumulation(toy_config, toy_data, tmp_path):
    """Parts of a batch give the gradient of the whole: four parts follow one within rounding. Dropout is off."""
    config = toy_config(images=96)
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, dropout=0.0))
    one = trainer(config, toy_data, tmp_path / "one").train()
    four = trainer(dataclasses.replace(config, accumulate=4), toy_data, tmp_path / "four").train()
    torch.testing.assert_close(weights(one), weights(four), rtol=0, atol=1e-5)


def test_gradient_clipping(toy_config, toy_data, tmp_path):
    """With plain SGD in Adam's place a step is at most lr times the clip."""
    t = trainer(toy_config(clip=1e-3, warmup=1, decay=False, lr=1.0), toy_data, tmp_path)
    t.optimizer = torch.optim.SGD(t.network.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in t.network.parameters()])
    t._one_step()
    moved = torch.cat([p.detach().flatten() for p in t.network.parameters()]) - before
    assert 0 < moved.norm() <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize(("loss", "optimizer"), [("edm", "adam"), ("ect", "radam"), ("ddpm", "adam")])
def test_cut_and_resumed(loss, optimizer, toy_config, toy_data, tmp_path):
    """Three pieces give the weights, averages and losses of one run, bit for bit; dropout is on."""
    config = toy_config(loss, optimizer=optimizer)
    whole = trainer(config, toy_data, tmp_path / "whole")
    one = whole.train()
    for until in (3, 4, None):
        cut = trainer(config, toy_data, tmp_path / "cut")
        three = cut.train(until)
    assert torch.equal(weights(one), weights(three)) and one.hash() == three.hash()
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), cut.network.parameters(), strict=True))
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "cut" / "loss.csv").read_text()


def test_the_global_generator_is_no_part_of_it(toy_config, toy_data, tmp_path):
    one = trainer(toy_config(), toy_data, tmp_path / "a").train()
    torch.manual_seed(99)
    assert torch.equal(weights(one), weights(trainer(toy_config(), toy_data, tmp_path / "b").train()))
    other = trainer(toy_config(seed=1), toy_data, tmp_path / "c").train()
    assert not torch.equal(weights(one), weights(other))


def test_lost_work_is_done_again(toy_config, toy_data, tmp_path):
    """A run that dies between checkpoints: rows of the loss after the last checkpoint are dropped and made again."""
    config = toy_config()
    whole = trainer(config, toy_data, tmp_path / "whole").train()
    t = trainer(config, toy_data, tmp_path / "cut", checkpoint_every=48)
    for _ in range(5):  # checkpoint after step 3
        t._one_step()
        t._housekeeping()
    t.reporter.flush()  # as if the log had been written later than the checkpoint
    again = trainer(config, toy_data, tmp_path / "cut")
    assert again.step == 3 and len(again.reporter.log.rows) == 3
    assert torch.equal(weights(again.train()), weights(whole))
    assert (tmp_path / "whole" / "loss.csv").read_text() == (tmp_path / "cut" / "loss.csv").read_text()


@pytest.mark.parametrize("change", [{"lr": 1e-4}, {"images": 256}, {"seed": 2}, {"batch": 8}, {"options": {"p_mean": 1.0}}])
def test_other_settings_are_refused(change, toy_config, toy_data, tmp_path):
    trainer(toy_config(), toy_data, tmp_path).train(2)
    name = "options.p_mean" if "options" in change else next(iter(change))
    with pytest.raises(ValueError, match=rf"out: .* holds a run with other settings \({name}: .* there, .* now\)"):
        trainer(toy_config(**change), toy_data, tmp_path)


def test_other_networks_and_images_are_refused(toy_config, toy_data, tmp_path):
    """A run continues with its own architecture and on its own images."""
    config = toy_config()
    trainer(config, toy_data, tmp_path).train(2)
    other = dataclasses.replace(config, network=dataclasses.replace(config.network, channels=16))
    with pytest.raises(
        ValueError, match=r"out: .* other settings \(network.channels: 8 there, 16 now\); give the same settings"
    ):
        trainer(other, toy_data, tmp_path)
    images = ImageData(255 - toy_data.images, toy_data.labels)
    with pytest.raises(ValueError, match=r"data: the run in .* was on other images .*; give the same data to continue it"):
        trainer(config, images, tmp_path)


def test_divergence(toy_config, toy_data, tmp_path):
    """A loss that is not a number stops the run before it reaches weights or checkpoint."""
    config = toy_config()
    t = trainer(config, toy_data, tmp_path)
    with torch.no_grad():
        t.network.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        TrainingError, match=r"step 0: loss nan.*No checkpoint was written yet.*conv_in.weight were not finite"
    ):
        t.train()
    assert not (tmp_path / "state.pt").exists()
    trainer(config, toy_data, tmp_path).train(2)
    t = trainer(config, toy_data, tmp_path)
    before = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        t.network.conv_in.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"step 2: .*The last good checkpoint is .*state.pt, of step 2"):
        t.train()
    assert (tmp_path / "state.pt").read_bytes() == before


def test_stopped_by_a_signal(toy_config, toy_data, tmp_path):
    """SIGTERM lets the step in hand finish, writes a checkpoint and hands the caller's handler back."""
    import signal

    old, config = signal.getsignal(signal.SIGTERM), toy_config()
    t = trainer(config, toy_data, tmp_path)
    step = t._one_step

    def stop_in_third():
        due = step()
        if t.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return due

    t._one_step = stop_in_third
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3; the same command continues"):
        t.train()
    assert signal.getsignal(signal.SIGTERM) is old
    again = trainer(config, toy_data, tmp_path)
    assert again.step == 3
    whole = trainer(config, toy_data, tmp_path / "whole").train()
    assert torch.equal(weights(again.train()), weights(whole))

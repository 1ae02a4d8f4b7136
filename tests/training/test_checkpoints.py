"""Checkpoints when things go wrong: a full disk, damaged files, older ones that are kept, divergence."""

import dataclasses
import resource
from collections import namedtuple

import pytest
import torch
from toy_training import trainer, weights

from fastdiff.training import TrainingError, checkpointing
from fastdiff.training.guard import FACTOR, PATIENCE, Guard


@pytest.fixture
def small_files():
    """small_files(bytes): no file of this process grows beyond that, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_old_checkpoint(toy_config, toy_data, tmp_path, small_files):
    """The error names step, place, what is whole and what to do; the run then ends as an undisturbed one."""
    config = toy_config()
    whole = trainer(config, toy_data, tmp_path / "whole").train()
    out = tmp_path / "cut"
    trainer(config, toy_data, out).train(3)
    before = (out / "state.pt").read_bytes()
    t = trainer(config, toy_data, out, checkpoint_every=16)
    small_files(20_000)
    with pytest.raises(
        TrainingError, match=r"step 4: no room left to write in .*MB free.*of step 3; free some space, then: fastdi"
    ):
        t.train()
    small_files(resource.RLIM_INFINITY)
    assert (out / "state.pt").read_bytes() == before and not list(out.glob(".*.part"))
    assert torch.equal(weights(trainer(config, toy_data, out).train()), weights(whole))


def test_full_disk_while_the_model_is_written(toy_config, toy_data, tmp_path, small_files, monkeypatch):
    """safetensors says it in its own words."""
    t = trainer(toy_config(images=16), toy_data, tmp_path)
    monkeypatch.setattr(t, "save", lambda: small_files(2_000))
    with pytest.raises(TrainingError, match="step 1: no room left to write"):
        t.train()
    assert not (tmp_path / "model.safetensors").exists()


def test_full_disk_is_seen_before_the_first_step(toy_config, toy_data, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5, 5))
    with pytest.raises(
        TrainingError, match=r"out: the disk of .* has 0 MB free, checkpoints .* take .* MB; free some space"
    ):
        trainer(toy_config(), toy_data, tmp_path)


def test_other_errors_are_not_renamed(tmp_path):
    with pytest.raises(OSError, match="read-only"), checkpointing.room(tmp_path, 0):
        raise OSError(30, "read-only file system")
    with pytest.raises(RuntimeError, match="shape"), checkpointing.room(tmp_path, 0):
        raise RuntimeError("shape mismatch")


def test_older_checkpoints(toy_config, toy_data, tmp_path):
    """keep=3: the newest and two before it; each can be gone back to, bit for bit."""
    config = toy_config(images=96)
    whole = trainer(config, toy_data, tmp_path, checkpoint_every=16, keep=3).train()
    steps = [torch.load(p, weights_only=True)["step"] for p in checkpointing.older_ones(tmp_path)]
    assert steps == [4, 5] and torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 6
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"out: the checkpoint .*state.pt is damaged .*; copy .*state-000000005.pt over it"):
        trainer(config, toy_data, tmp_path)
    checkpointing.older_ones(tmp_path)[0].replace(tmp_path / "state.pt")
    again = trainer(config, toy_data, tmp_path)
    assert again.step == 4 and torch.equal(weights(again.train()), weights(whole))


def test_damaged_without_an_older_one(toy_config, toy_data, tmp_path):
    trainer(toy_config(), toy_data, tmp_path).train(1)
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"state.pt is damaged .*; start again in another --out"):
        trainer(toy_config(), toy_data, tmp_path)


def judge(guard, losses, norm=1.0, network=None):
    for step, loss in enumerate(losses):
        if guard.add(step, torch.tensor(loss), torch.tensor(norm)):
            yield from guard.settle(network or torch.nn.Linear(1, 1), 1e-3, True, lambda: "KEPT")


def test_guard_lets_ordinary_losses_pass():
    """Noise, single spikes and slow growth are no explosion."""
    losses = [1.0, 0.5, 0.7, 1e5, 0.4] * 20 + [0.1 * 1.05**k for k in range(100)]
    assert [loss for _, loss in judge(Guard(), losses)] == pytest.approx(losses)


def test_guard_stops_an_explosion():
    with pytest.raises(
        TrainingError, match=rf"step {29 + PATIENCE}: loss 5000, more than 1000 times .* exploded. KEPT. .*--lr"
    ):
        list(judge(Guard(), [1.0] * 30 + [5.0 * FACTOR] * PATIENCE))


@pytest.mark.parametrize("lag", [1, 4])
def test_guard_names_the_step(lag):
    """Read every step, or together later: the step that went wrong is the one named."""
    seen = judge(Guard(lag), [1.0, 1.0, float("inf"), 1.0])
    with pytest.raises(
        TrainingError, match=r"step 2: loss inf, gradient norm 1.0. Training diverged. KEPT. Likely the learning"
    ):
        list(seen)


def test_guard_tells_causes_apart():
    with pytest.raises(TrainingError, match=r"The loss is finite, its gradient is not: try --no-bf16"):
        list(judge(Guard(), [1.0], float("nan")))
    network = torch.nn.Linear(1, 1)
    with torch.no_grad():
        network.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"The weights bias were not finite before this step"):
        list(judge(Guard(), [float("nan")], network=network))


def test_explosion_in_a_run(toy_config, toy_data, tmp_path):
    """A learning rate that no network survives ends with the cause, not with rubbish in the checkpoint."""
    config = dataclasses.replace(toy_config(images=16 * 400, lr=1e4, warmup=0, decay=False), optimizer="adam")
    with pytest.raises(TrainingError, match=r"step \d+: .*(diverged|exploded).*--lr"):
        trainer(config, toy_data, tmp_path).train()

"""Checkpoints: what is saved comes back bit for bit, all of it or nothing, and a bad file says what is wrong."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastdiff
from fastdiff import CheckpointError, Model, Prediction, UNet, UNetConfig
from fastdiff.atomic import atomically
from fastdiff.schedules import DDPM, EDM, VP

CONFIG = UNetConfig(
    resolution=8, in_channels=1, out_channels=1, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4, labels=3
)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, **changes)
    net = UNet(config)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return Model(
        net.eval(),
        EDM(sigma_max=40.0),
        Prediction("edm", sigma_data=0.4),
        "consistency",
        (1, 8, 8),
        config.labels,
        {1: [40.0], 2: [40.0, 0.8]},
        {"licence": "Apache-2.0", "command": "made up"},
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    tiny().save(path)
    return path


def rewrite(path, change=None, state=None):
    """The file with another description, or other weights."""
    with safe_open(path, "pt") as file:
        metadata, old = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["fastdiff"])
    if change:
        change(description)
    save_file(old if state is None else state(old), path, metadata={"fastdiff": json.dumps(description)})


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_round_trip(tmp_path, embedding):
    model, path = tiny(embedding=embedding), tmp_path / "m.safetensors"
    model.save(path)
    again = fastdiff.load(path)
    assert again.network.config == model.network.config
    for field in ("schedule", "prediction", "family", "shape", "labels", "times", "info"):
        assert getattr(again, field) == getattr(model, field), field
    assert again.state.keys() == model.state.keys()
    assert all(torch.equal(again.state[k], v) and again.state[k].dtype == v.dtype for k, v in model.state.items())
    assert again.hash() == model.hash()
    assert not again.network.training and not any(p.requires_grad for p in again.network.parameters())
    x, c, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, -1.0]), torch.tensor([0, 2])
    assert torch.equal(again.network(x, c, labels), model.network(x, c, labels))


@pytest.mark.parametrize("schedule", [VP(t_min=1e-4), DDPM(T=100, law="cosine")])
def test_schedules_are_kept(tmp_path, schedule):
    model = dataclasses.replace(tiny(), schedule=schedule, prediction=Prediction("v", time_scale=7.0), family="diffusion")
    model.save(tmp_path / "m.safetensors")
    again = fastdiff.load(tmp_path / "m.safetensors")
    assert again.schedule == schedule and again.prediction == model.prediction


def test_half_precision_file(tmp_path):
    """Stored as float16 it is half as large, and loads as float32 of the rounded values."""
    model = tiny()
    model.save(tmp_path / "full.safetensors")
    model.save(tmp_path / "half.safetensors", torch.float16)
    again = fastdiff.load(tmp_path / "half.safetensors")
    for k, v in model.state.items():
        assert again.state[k].dtype == torch.float32 and torch.equal(again.state[k], v.half().float())
    sizes = [os.path.getsize(tmp_path / f"{n}.safetensors") for n in ("full", "half")]
    weights = sum(v.numel() for v in model.state.values())
    assert sizes[0] - sizes[1] >= 2 * weights - 1000  # the header's offsets differ a little in length


def test_hash_follows_weights_and_description():
    base = tiny()
    other = tiny()
    assert base.hash() == other.hash() and len(base.hash()) == 16
    other.network.conv_in.weight.data[0, 0, 0, 0] += 1e-7
    assert base.hash() != other.hash()
    assert dataclasses.replace(base, times={}).hash() != base.hash()
    assert dataclasses.replace(base, schedule=EDM()).hash() != base.hash()
    assert dataclasses.replace(base, info={"licence": "none"}).hash() == base.hash(), "provenance is no part of the model"


def test_failed_save_leaves_the_old_file(saved, monkeypatch):
    """A full disk in the middle of writing: the old file stays whole and no temporary one is left."""
    before = saved.read_bytes()

    def half(state, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.model.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        tiny(1).save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_interrupted_before_the_move(saved):
    before = saved.read_bytes()

    def write(path):
        with open(path, "wb") as file:
            file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomically(saved, write)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_saved_with_ordinary_permissions(saved):
    """mkstemp's 0600 does not survive: other users may read what the umask lets them."""
    plain = saved.parent / "plain"
    plain.touch()
    assert saved.stat().st_mode == plain.stat().st_mode


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist; create it first"):
        tiny().save(tmp_path / "nowhere" / "m.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write in"):
        tiny().save(tmp_path / "m.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated(saved, keep):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match=r"model: .*model.safetensors is truncated or not a .safetensors file .*copy it"
    ):
        fastdiff.load(saved)


def test_not_safetensors_at_all(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"its 1 tensors \(a, ...\) are of another program"):
        fastdiff.load(path)


def test_foreign(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"conv_in.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"of another program: it is not a fastdiff, .*fastdiff.wrap"):
        fastdiff.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_not_finite(saved, value):
    def spoil(state):
        state["conv_in.weight"][0, 0, 0, 0] = value
        return state

    rewrite(saved, state=spoil)
    with pytest.raises(CheckpointError, match=r"model: the weights in .* 1 not finite: conv_in.weight \(1 of 72 values\)"):
        fastdiff.load(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "conv_in.bias"}, "1 missing: conv_in.bias"),
        (lambda s: s | {"extra": torch.ones(1)}, "1 unexpected: extra"),
        (lambda s: s | {"conv_in.bias": torch.ones(9)}, r"1 of another shape: conv_in.bias \[9\] where \[8\] belongs"),
    ],
)
def test_weights_that_do_not_fit(saved, change, words):
    rewrite(saved, state=change)
    with pytest.raises(CheckpointError, match=rf"the weights in .* do not fit the network: {words}"):
        fastdiff.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("schedule"),
        lambda d: d["network"].pop("config"),
        lambda d: d["network"]["config"].update(novelty=1),
        lambda d: d["schedule"].update(name="unheard-of"),
        lambda d: d.update(prediction={"kind": "wrong"}),
        lambda d: d.update(times=None),
    ],
)
def test_bad_description(saved, change):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=r"the description in .* is incomplete or inconsistent"):
        fastdiff.load(saved)


def test_damaged_description(saved):
    save_file({"a": torch.ones(1)}, saved, metadata={"fastdiff": "{not json"})
    with pytest.raises(CheckpointError, match=r"the description in .* is damaged"):
        fastdiff.load(saved)


def test_newer_format(saved):
    rewrite(saved, lambda d: d.update(format=99))
    with pytest.raises(CheckpointError, match="has format 99, this fastdiff reads 1; update fastdiff"):
        fastdiff.load(saved)


def test_unknown_name(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="model: mnist-gan is no file; give the path of a checkpoint or a packaged name"
    ):
        fastdiff.load("mnist-gan")
    with pytest.raises(FileNotFoundError, match="is no file"):
        fastdiff.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"there is no config.json or model_index.json in the folder"):
        fastdiff.load(tmp_path)


def test_network_without_schedule():
    for net in (torch.nn.Identity(), lambda x, t: x):
        with pytest.raises(TypeError, match=r"alone does not say how it was trained; wrap it .*fastdiff.wrap"):
            fastdiff.load(net)
    with pytest.raises(TypeError, match="expected a path, a packaged name, a Model or None, got int"):
        fastdiff.load(3)


def test_only_unets_are_saved(tmp_path):
    model = fastdiff.wrap(torch.nn.Identity(), schedule=EDM(), prediction="eps", shape=(1, 2, 2))
    with pytest.raises(TypeError, match=r"only a fastdiff.UNet can be saved .*this is a Identity"):
        model.save(tmp_path / "m.safetensors")


def test_wrap():
    """A UNet brings its shape and labels; a plain callable gets x and t unless it asks for preconditioning."""
    net = tiny().network
    model = fastdiff.wrap(net, schedule=EDM(), prediction="edm", precondition=True)
    assert model.shape == (1, 8, 8) and model.labels == 3 and not model.prediction.raw
    assert fastdiff.wrap(lambda x, t: x, schedule=VP(), prediction="v").prediction == Prediction("v", raw=True)
    for bad, error, words in (
        ({"network": 3, "schedule": EDM()}, TypeError, "network: 3 cannot be called"),
        ({"network": net, "schedule": "edm"}, TypeError, "schedule: expected a fastdiff.schedules object"),
        ({"network": net, "schedule": EDM(), "prediction": "noise"}, ValueError, "prediction: 'noise' is not known"),
        (
            {"network": net, "schedule": EDM(), "family": "gan"},
            ValueError,
            "family: 'gan' is not known; use one of diffusion",
        ),
    ):
        with pytest.raises(error, match=words):
            fastdiff.wrap(**bad)

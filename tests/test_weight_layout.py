"""Convolution weights lie channels-last, as the images do, however a network came to be: no call copies one."""

import copy
import importlib

import pytest
import torch
from tiny import awake, tiny
from torch.profiler import ProfilerActivity, profile

import fastdiff
from fastdiff import UNet, schedules
from fastdiff.compile.fits import Fingerprint

CONFIG = tiny(in_channels=2, out_channels=2, dropout=0.0)
OTHER = tiny(
    in_channels=2,
    out_channels=2,
    dropout=0.0,
    conditioning="scale_shift",
    resampling="block",
    head_channels=4,
    skip_scale=0.5,
)


def convolutions(network):
    weights = [p for p in network.parameters() if p.dim() == 4]
    assert weights
    return weights


def channels_last(network):
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions(network))


def wrapped(network):
    return fastdiff.wrap(network, schedule=schedules.EDM(), prediction="edm")


def own_file(folder):
    wrapped(awake(CONFIG)).save(folder / "own.safetensors")
    return fastdiff.load(folder / "own.safetensors")


def diffusers_object(_):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return fastdiff.load(
        diffusers.UNet2DModel(8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    )


def program_that_cannot_run(folder, monkeypatch):
    """A compiled model's file where its program is refused: the network that was mapped runs instead."""
    store = importlib.import_module("fastdiff.compile.store")  # the package has a function of this name
    fastdiff.compile(wrapped(awake(CONFIG))).save(folder / "program.safetensors")
    monkeypatch.setattr(store, "obstacle", lambda network: "it is forbidden here")
    with pytest.warns(UserWarning, match="forbidden"):
        return fastdiff.load(folder / "program.safetensors")


WAYS = {
    "built": lambda _: wrapped(UNet(CONFIG)),
    "own file": own_file,
    "diffusers object": diffusers_object,
    "copy": lambda _: copy.deepcopy(wrapped(UNet(CONFIG))),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_model(way, tmp_path):
    assert channels_last(WAYS[way](tmp_path).network)


def test_program_that_cannot_run(tmp_path, monkeypatch):
    assert channels_last(program_that_cannot_run(tmp_path, monkeypatch).network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_a_state_dict_stay_the_callers(dtype):
    """A layout that fits at once is copied too, or training one network would change the other."""
    weights = {k: v.detach().to(dtype) for k, v in awake(CONFIG).state_dict().items()}
    network = fastdiff.checkpoints.build(CONFIG)
    fastdiff.checkpoints.fill(network, fastdiff.checkpoints.Layout(), {**weights}, "weights")
    assert channels_last(network)
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[key].float()) and value.data_ptr() != weights[key].data_ptr()


def test_files_and_hashes_know_no_layout(tmp_path):
    """The same bytes, whether weights are channels-last or not."""
    rows = wrapped(awake(CONFIG))
    rows.network.to(memory_format=torch.contiguous_format)
    lasts = wrapped(awake(CONFIG))
    assert not channels_last(rows.network) and channels_last(lasts.network)
    assert rows.hash() == lasts.hash()
    rows.save(tmp_path / "rows")
    lasts.save(tmp_path / "lasts")
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "lasts").read_bytes()
    again = fastdiff.load(tmp_path / "lasts")
    assert again.hash() == rows.hash()
    assert all(torch.equal(v, rows.state[k]) for k, v in again.state.items())


def copied_shapes(call):
    """Shapes of what PyTorch copies in a call, at any depth."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    return [tuple(e.input_shapes[0]) for e in seen.events() if e.name == "aten::copy_" and e.input_shapes]


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["ddpm", "adm"])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_call_copies_a_weight(config, batch):
    network = awake(config)
    shapes = {tuple(p.shape) for p in convolutions(network) if p.shape[-1] == 3}
    x = torch.randn(batch, 2, 8, 8).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def call():
        network(x, torch.zeros(batch))

    assert not shapes & set(copied_shapes(call))
    network.to(memory_format=torch.contiguous_format)
    assert shapes & set(copied_shapes(call)), "the profiler no longer sees the copies that this test is about"


def test_fingerprint_looks_at_the_weights_themselves():
    """A change below `.data`, which counts no version, is seen in a channels-last weight as in any other."""
    network = awake(CONFIG)
    fingerprint = Fingerprint(network)
    for weight in convolutions(network):
        assert fingerprint.holds(network)
        before = weight.detach().clone()
        weight.data.mul_(2)
        assert not fingerprint.holds(network)
        weight.data.copy_(before)

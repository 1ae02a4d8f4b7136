"""A diffusers pipeline is read once, and again when its weights, scheduler or device are others."""

import gc

import pytest
import torch

from fastdiff import held
from fastdiff.compile import automatic

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(8, block_out_channels=(8,), norm_num_groups=2, layers_per_block=1, **blocks)
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())


def test_read_once(pipe):
    assert held.read(pipe, CPU) is held.read(pipe, CPU)


def test_changed_weights(pipe):
    model = held.read(pipe, CPU)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    again = held.read(pipe, CPU)
    assert again is not model and again is held.read(pipe, CPU)
    weights = dict(again.network.named_parameters())
    assert any(torch.equal(w, pipe.unet.conv_in.weight) for w in weights.values())


def test_changed_scheduler(pipe):
    model = held.read(pipe, CPU)
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    again = held.read(pipe, CPU)
    assert again is not model and again.prediction != model.prediction


def test_goes_with_the_pipeline(pipe):
    held.read(pipe, CPU)
    assert pipe in held._held
    before = len(held._held)
    pipe.unet = None
    del pipe
    gc.collect()
    assert len(held._held) <= before


def test_what_a_program_would_have_saved_adds_up(pipe):
    """Each call is too short for a program; a hundred of them are not."""
    model, threads = held.read(pipe, CPU), torch.get_num_threads()
    network = model.network
    store = automatic.kept(model)
    first = automatic._too_little(model, network, CPU, torch.float32, 1)
    assert "compile='fast'" in first and store.size
    operations, _ = store.size
    enough = automatic.OPERATIONS_PER_SECOND * threads * 100 / (automatic.SAVED * operations)
    assert automatic._too_little(model, network, CPU, torch.float32, int(enough)) == ""
    assert automatic._too_little(model, network, CPU, torch.float32, 0) == ""

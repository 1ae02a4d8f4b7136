"""diffusers' own networks give the numbers that diffusers gives, read from memory and from its files, and written back."""

from itertools import pairwise

import pytest
import torch
from recorded_networks import error

import fastdiff
from fastdiff import CheckpointError

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -e '.[test]'")

DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
PLAIN = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "down_block_types": DOWN}
PLAIN |= {"up_block_types": UP}
CONFIGS = {
    # google/ddpm-cifar10-32 and ddpm-*-256
    "ddpm": PLAIN
    | {"layers_per_block": 2, "attention_head_dim": None, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1}
    | {"downsample_padding": 0},
    "defaults": PLAIN | {"num_class_embeds": 5},
    "square": PLAIN | {"sample_size": (16, 16), "attention_head_dim": 16, "time_embedding_dim": 64},
    "no attention": PLAIN
    | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    | {"block_out_channels": (32, 48), "norm_num_groups": 8},
    "bare middle": PLAIN | {"resnet_time_scale_shift": "scale_shift"},
    # openai/diffusers-cd_imagenet64_l2
    "consistency": {
        "sample_size": 16,
        "layers_per_block": 1,
        "num_class_embeds": 5,
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": 16,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "upsample_type": "resnet",
        "downsample_type": "resnet",
    },
}
NCSNPP = {  # google/ncsnpp-*
    "sample_size": 16,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 2,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.41421356237,
    "attention_head_dim": None,
}
CONFIGS |= {"ncsnpp": NCSNPP, "ncsnpp centred": NCSNPP | {"center_input_sample": True}}


def network(name):
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**CONFIGS[name]).eval()
    for p in net.parameters():
        if p.dim() == 1:
            p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("name", CONFIGS)
def test_networks(name, tmp_path):
    net = network(name)
    model = fastdiff.load(net)
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 3]) if CONFIGS[name].get("num_class_embeds") else None
    for t in (0.01, 3.0, 100.0) if "ncsnpp" in name else (0, 7, 999):
        assert error(model.net(x, t, labels), net(x, torch.tensor(t), class_labels=labels).sample) <= 1e-5
    net.save_pretrained(tmp_path)
    assert fastdiff.load(tmp_path).hash() == model.hash()


def test_images_in_0_1(tmp_path):
    """NCSN++ that does not centre its input knows images in [0, 1]: Euler's steps there, the images in [-1, 1]."""
    net = network("ncsnpp")
    model = fastdiff.load(net)
    z = torch.randn(2, 3, 16, 16)
    plan = fastdiff.make_plan(model, 4, "euler")
    x, levels = z * plan.times[0], [*plan.times, 0.0]
    for now, then in pairwise(levels):
        x = x + (now - then) * now * net(x, torch.tensor(now)).sample  # dx/dt = -t score
    got = fastdiff.sample(model, nfe=4, sampler="euler", noise=[z], seeds=[0, 1], clip_output=False)
    assert error(got, 2 * x - 1) <= 2e-5
    model.save(tmp_path / "m.safetensors")
    assert fastdiff.load(tmp_path / "m.safetensors").convention == model.convention
    for wrong in ({"clip": True}, {"threshold": 0.99}, {"start": z, "t_start": 1.0}):
        with pytest.raises(ValueError, match=r"this network's images lie in \[0, 1\]"):
            fastdiff.sample(model, nfe=4, sampler="euler", seeds=[0, 1], **wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not read"),
        ({"center_input_sample": True}, "center_input_sample is not read"),
        ({"act_fn": "gelu"}, "act_fn 'gelu' is not read"),
        ({"sample_size": None}, "sample_size None is not read"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor is read as 1 only"),
    ],
)
def test_what_is_not_read(change, words):
    with pytest.raises(CheckpointError, match=f"model: .*{words}"):
        fastdiff.load(diffusers.UNet2DModel(**(PLAIN | change)))


def test_pipeline_folder(tmp_path):
    pipe = diffusers.DDPMPipeline(network("ddpm"), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(tmp_path)
    assert fastdiff.load(tmp_path).hash() == fastdiff.load(pipe).hash()
    assert fastdiff.load(pipe).schedule.law == "cosine"


@pytest.mark.parametrize("name", [n for n in CONFIGS if "ncsnpp" not in n])
def test_back(name, tmp_path):
    """to_diffusers: diffusers loads it and gives the same numbers."""
    model = fastdiff.load(network(name))
    fastdiff.to_diffusers(model, tmp_path / "p")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "p")
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 3]) if model.labels else None
    assert error(pipe.unet(x, torch.tensor(7), class_labels=labels).sample, model.net(x, 7, labels)) <= 1e-5
    assert fastdiff.load(pipe).schedule == model.schedule

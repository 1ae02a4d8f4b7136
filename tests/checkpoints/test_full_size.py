"""Networks of published size: their numbers of parameters, and that reading them takes little more than their own memory."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import full_size
import pytest
import torch

import fastdiff
from fastdiff.checkpoints import openai

MEMORY = 1.2  # of the network's own
DIFFUSERS = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed; pip install -e '.[test]'"
)


def parameters(model: fastdiff.Model) -> int:
    return sum(p.numel() for p in model.network.parameters())


def test_ddpmpp():
    """EDM's DDPM++ for CIFAR-10, 55.73 M, under EDM's own names; 1152 of them of the augmentation."""
    named = full_size.edm_cifar10()
    model = fastdiff.from_state_dict(named.weights, "edm", named.class_name, **named.constructor)
    assert parameters(model) == sum(w.numel() for w in named.weights.values()) == 55_733_891
    assert torch.equal(model.network.conv_in.weight, named.weights["model.enc.32x32_conv.weight"])


@DIFFUSERS
def test_ddpm():
    """DDPM's network for CIFAR-10 as diffusers builds it."""
    import diffusers

    with torch.device("meta"):
        net = diffusers.UNet2DModel(**full_size.DDPM_CIFAR10)
    weights = full_size.random_weights((k, tuple(v.shape)) for k, v in net.state_dict().items())
    model = fastdiff.from_state_dict(weights, "diffusers", **full_size.DDPM_CIFAR10)
    assert parameters(model) == sum(p.numel() for p in net.parameters()) == 35_746_307


A, IMAGES = {"blocks": 2, "attention": (32, 16, 8)}, {"channels": 256, "classes": 0, "out": 3, "flat": False}
IMAGENET64 = {"channels": 192, "mult": (1, 2, 3, 4), "size": 64, **A, "blocks": 3, "out": 3, "flat": False}
LSUN = {"mult": (1, 1, 2, 2, 4, 4), "size": 256, **A}
IMPROVED = {"channels": 128, "mult": (1, 2, 3, 4), "size": 64, "blocks": 3, "attention": (16, 8), "updown": False}
PUBLISHED = {  # preset -> shapes by the published flags, millions of parameters
    "64x64_diffusion": (full_size.ADM, 295.9),
    "128x128_diffusion": ({"channels": 256, "mult": (1, 1, 2, 3, 4), "size": 128, **A}, 421.5),
    "256x256_diffusion": (LSUN | {"channels": 256}, 553.8),
    "256x256_diffusion_uncond": (LSUN | {"channels": 256, "classes": 0}, 552.8),
    "512x512_diffusion": ({"channels": 256, "mult": (0.5, 1, 1, 2, 2, 4, 4), "size": 512, **A}, 559.0),
    "lsun": (LSUN | {"channels": 256, "classes": 0}, 552.8),
    "imagenet64_uncond_100M_1500K": (IMPROVED | {"classes": 0}, 121.1),
    "imagenet64_cond_270M_250K": (IMPROVED | {"channels": 192}, 273.0),
    "cifar10_uncond_50M_500K": (IMPROVED | {"mult": (1, 2, 2, 2), "size": 32, "classes": 0}, 52.5),
    **{name: (IMAGENET64, 295.9) for name in ("edm_imagenet64_ema", "cd_imagenet64", "ct_imagenet64")},
    **{name: (LSUN | IMAGES, 552.8) for name in ("edm_lsun256", "cd_lsun256", "ct_lsun256")},
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_openai_presets(preset):
    """The published models: a preset and the shapes of the state dict make a network that takes every tensor."""
    flags, millions = PUBLISHED[preset]
    state = {name: torch.empty(shape, device="meta") for name, shape in full_size.openai(**flags)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the order of q, k and v is among what was published
        network, layout, about = openai.read(state, None, {"preset": preset})
    used = {name for key in network.state_dict() for name in layout.source(key)[0]}
    assert used == set(state) and sum(p.numel() for p in network.parameters()) == sum(w.numel() for w in state.values())
    assert round(sum(w.numel() for w in state.values()) / 1e6, 1) == millions
    config = network.config
    assert (config.resolution, config.labels) == (flags["size"], flags.get("classes", 1000))
    assert about.family == ("consistency" if preset[:3] in ("cd_", "ct_") else "diffusion")
    assert about.prediction.learned_variance == (flags.get("out", 6) == 6)
    assert set(PUBLISHED) == set(openai.PRESETS)


# Its own process: the high-water mark of memory, what was there before left out.
CHILD = """
import sys, fastdiff
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) << 10
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
model = fastdiff.load(sys.argv[1], **eval(sys.argv[2]))
print(status("VmHWM") - before, sum(p.numel() for p in model.network.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=DIFFUSERS if "diffusers" in k else ()) for k in full_size.FORMATS])
def test_memory(kind, tmp_path):
    """ADM for ImageNet-64, 295.9 M weights in float32 in each format."""
    path, hints = full_size.write(kind, tmp_path)
    command = [sys.executable, "-c", CHILD, str(path), repr(hints)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, count = map(int, result.stdout.split())
    print(f"{kind}: {count:,} parameters, peak {peak / (4 * count):.2f} of their memory")
    assert count == (295_904_454 if "openai" in kind else 295_899_267)  # guided-diffusion gives the variance too
    assert peak <= MEMORY * 4 * count

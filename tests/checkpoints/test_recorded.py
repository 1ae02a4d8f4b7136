"""Networks of other projects give the numbers their own code gave: raw outputs and D within 1e-5 of the largest value.

Their own float32 round-off is 1e-6 to 2e-6 (4e-6 where times run to 999); a wrong eps of a norm moves results by 6e-5.
"""

import dataclasses
import math

import pytest
import torch
from recorded_networks import error

import fastdiff
from fastdiff import UNetConfig
from fastdiff.checkpoints import edm
from fastdiff.checkpoints.layout import Layout, fill
from fastdiff.nn import ResBlock

EDM = ["edm_ddpmpp_cond_aug", "edm_ddpmpp_uncond", "edm_ncsnpp_ve", "edm_adm_cond"]
GUIDED = ["gd_unet_adm", "gd_unet_iddpm_style"]
LIMIT = 1e-5


def labels_of(io):
    return io.get("class_labels", io.get("y")), io.get("augment_labels")


@pytest.mark.parametrize("name", [*EDM, "cm_unet_cond_distill"])
def test_edm_and_consistency_models(case, name):
    """F and D at every recorded noise level, class labels one-hot or as indices, augmentation labels."""
    io, model = case(name).io, case(name).model()
    labels, augment = labels_of(io)
    for x, sigma, c_noise, F, D in zip(io["x"], io["sigma"], io["c_noise"], io["F_raw"], io["D"], strict=True):
        c = model.denoiser.coefficients(sigma.double().numpy())
        assert error(model.net(x * float(c.c_in), c_noise, labels, augment), F) <= LIMIT
        assert math.isclose(c.c_noise, c_noise, rel_tol=1e-5, abs_tol=1e-6)
        assert error(model.denoise(x, sigma, labels, augment), D) <= LIMIT


@pytest.mark.parametrize("name", EDM)
def test_edm_one_level_per_image(case, name):
    io, model = case(name).io, case(name).model()
    assert error(model.denoise(io["x_vec"], io["sigma_vec"], *labels_of(io)), io["D_vec"]) <= LIMIT


@pytest.mark.parametrize("name", ["edm_ddpmpp_cond_aug", "edm_adm_cond"])
def test_edm_without_labels(case, name):
    """No class is no error here, and class indices are the same as one-hot vectors."""
    io, model = case(name).io, case(name).model()
    labels, augment = labels_of(io)
    x, sigma = io["x"][1], io["sigma"][1]
    assert error(model.denoise(x, sigma, None, augment), io["D_nolabel"]) <= LIMIT
    assert error(model.denoise(x, sigma, labels.argmax(1), augment), io["D"][1]) <= LIMIT
    if augment is not None:
        assert error(model.denoise(x, sigma, labels), io["D_noaug"]) <= LIMIT
        assert error(model.denoise(x, sigma, labels), io["D"][1]) > 100 * LIMIT


@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion(case, name):
    """Both orders of q, k and v; D reads the first half of the channels, the noise."""
    io = case(name).io
    for order, key in ((False, "out_legacy"), (True, "out_new")):
        model = case(name).model(use_new_attention_order=order)
        assert model.prediction.learned_variance and model.schedule.name == "ddpm"
        for t, out in zip(io["t"], io[key], strict=True):
            assert error(model.net(io["x"], t), out) <= LIMIT
            alpha, sigma = (float(f(t)) for f in (model.schedule.alpha, model.schedule.sigma))
            D = (io["x"].double() - sigma * out[:, :3].double()) / alpha
            assert error(model.denoise(io["x"], t), D) <= LIMIT
    assert error(io["out_new"], io["out_legacy"]) > 1e4 * LIMIT


def test_score_sde_vp(case):
    io, model = case("sde_ddpmpp_vp").io, case("sde_ddpmpp_vp").model()
    for x, t, labels, F, score in zip(io["x"], io["t"], io["labels"], io["F_raw"], io["score"], strict=True):
        assert error(model.net(x, labels), F) <= LIMIT
        t = t.double()
        alpha, sigma = float(model.schedule.alpha(t)), float(model.schedule.sigma(t))
        assert error(model.denoise(x, t), (x.double() + sigma**2 * score.double()) / alpha) <= LIMIT


def test_diffusers(case):
    io, model = case("diffusers_unet2d_ddpm").io, case("diffusers_unet2d_ddpm").model()
    for t, out in zip(io["t"], io["out"], strict=True):
        assert error(model.net(io["x"], t), out) <= LIMIT


@pytest.mark.parametrize("variant", ["adm_heads2", "song_attn_up", "song_down", "adm_down", "adm_up"])
def test_residual_blocks(case, variant):
    """Single blocks of EDM on images that are not square: several heads, filters, resampling both ways."""
    data, v = case("edm_unetblock_variants"), case("edm_unetblock_variants").constructor[variant]
    song = variant.startswith("song")
    base = UNetConfig.ddpmpp if song else UNetConfig.adm
    config = base(
        channels=v["emb_channels"],
        embedding_multiplier=1,
        group_channels=4,
        dropout=0.1,
        head_channels=v.get("channels_per_head", 0),
        filter=v.get("resample_filter", (1, 1)),
    )
    change = "up" if v.get("up") else "down" if v.get("down") else ""
    block = ResBlock(v["in_channels"], v["out_channels"], config, attention=v.get("attention", False), change=change)
    layout = Layout(ignored="resample_filter")
    layout.modules.update({ours: f"{variant}.{theirs}" for theirs, ours in edm.RESIDUAL.items()})
    if block.attention is not None:
        layout.qkv("attention.qkv", f"{variant}.qkv", block.attention.heads, "edm")
    fill(block, layout, {k: x for k, x in data.weights.items() if k.startswith(f"{variant}.")}, variant)
    got = block(data.io[f"{variant}.x"], data.io[f"{variant}.emb"])
    assert error(got, data.io[f"{variant}.out"]) <= LIMIT


@pytest.mark.parametrize("name", [*EDM, *GUIDED, "cm_unet_cond_distill", "sde_ddpmpp_vp", "diffusers_unet2d_ddpm"])
def test_round_trip(case, name, tmp_path):
    """Through our own format and back: the same model, bit for bit."""
    io, model = case(name).io, case(name).model()
    model.save(tmp_path / "m.safetensors")
    again = fastdiff.load(tmp_path / "m.safetensors")
    for field in dataclasses.fields(model):
        if field.name != "network":
            assert getattr(again, field.name) == getattr(model, field.name), field.name
    assert again.network.config == model.network.config and again.hash() == model.hash()
    x = io["x"][0] if io["x"].dim() == 5 else io["x"]
    t = float(io["sigma"][1] if "sigma" in io else io["t"][1])
    labels, augment = labels_of(io)
    assert torch.equal(again.net(x, t, labels, augment), model.net(x, t, labels, augment))
    assert torch.equal(again.denoise(x, t, labels, augment), model.denoise(x, t, labels, augment))


def test_weights_are_copies(case):
    """Training an imported model leaves the caller's weights alone."""
    data = case("diffusers_unet2d_ddpm")
    before = data.weights["conv_in.weight"].clone()
    data.model().network.conv_in.weight.add_(1)
    assert torch.equal(data.weights["conv_in.weight"], before)

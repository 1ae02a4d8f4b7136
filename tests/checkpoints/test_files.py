"""Files of other projects, told by their content, give the models that their weights and arguments give."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from writers import diffusers_folder, edm_pickle, score_sde_checkpoint, state_of

import fastdiff
from fastdiff import CheckpointError, Prediction
from fastdiff.checkpoints import score_sde
from fastdiff.schedules import DDPM, EDM, VE, VP

EDM_CASES = ["edm_ddpmpp_cond_aug", "edm_ddpmpp_uncond", "edm_ncsnpp_ve", "edm_adm_cond"]
DDPM_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


def same(got, expected):
    """The same weights bit for bit, and everything that is said of them."""
    assert got.state.keys() == expected.state.keys()
    assert all(torch.equal(v, expected.state[k]) for k, v in got.state.items())
    for field in ("schedule", "prediction", "family", "shape", "labels", "convention"):
        assert getattr(got, field) == getattr(expected, field), field
    assert got.network.config == expected.network.config


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", EDM_CASES)
def test_edm_pickle(case, name, protocol, tmp_path):
    """The network's record with its arguments; the code stored beside it is not run."""
    edm_pickle(tmp_path / "network.pkl", case(name), protocol)
    same(fastdiff.load(tmp_path / "network.pkl"), case(name).model())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["gd_unet_adm", "gd_unet_iddpm_style", "cm_unet_cond_distill"])
def test_openai_state_dict(case, name, legacy, tmp_path):
    """The architecture follows from shapes and names, but for the image size and the number of heads."""
    data, path = case(name), tmp_path / "model.pt"
    torch.save(state_of(data), path, _use_new_zipfile_serialization=not legacy)
    hints = {k: data.constructor[k] for k in ("image_size", "num_heads", "num_head_channels") if k in data.constructor}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fastdiff.load(path, **hints), data.model())


def test_openai_order_is_asked_for(case, tmp_path):
    """Shapes cannot tell the orders of q, k and v apart: a warning says how to check, an argument settles it."""
    data, path = case("gd_unet_adm"), tmp_path / "model.pt"
    torch.save(state_of(data), path)
    hints = {"image_size": 16, "num_head_channels": 16}
    with pytest.warns(UserWarning, match=r"legacy order of q, k and v .* use_new_attention_order=True"):
        model = fastdiff.load(path, **hints)
    same(model, data.model(use_new_attention_order=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(fastdiff.load(path, use_new_attention_order=True, **hints), data.model(use_new_attention_order=True))


def test_openai_needs_its_size(case, tmp_path):
    torch.save(state_of(case("gd_unet_adm")), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model: .*config: UNetModel needs image_size; give the arguments"):
        fastdiff.load(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"UNetModel has no option num_head; it has .*num_heads"):
        fastdiff.load(tmp_path / "model.pt", image_size=16, num_head=4)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_score_sde(case, legacy, tmp_path):
    """The moving averages are the weights; names lose DataParallel's prefix."""
    data = case("sde_ddpmpp_vp")
    score_sde_checkpoint(tmp_path / "checkpoint_8.pth", data, legacy)
    same(fastdiff.load(tmp_path / "checkpoint_8.pth", **data.constructor), data.model())


@pytest.mark.parametrize(("preset", "millions"), [("cifar10_ddpmpp_continuous", 61.8), ("cifar10_ncsnpp_continuous", 62.8)])
def test_score_sde_presets(preset, millions):
    """The published configurations: NCSN++ sees images in [-1, 1] at twice the level of its own [0, 1]."""
    network, _, about = score_sde.read({}, None, {"preset": preset})
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
    assert about.schedule == (VP() if "ddpmpp" in preset else VE(0.02, 100.0))
    assert about.convention.unit_range == ("ncsnpp" in preset)


def test_score_sde_needs_its_configuration(case, tmp_path):
    score_sde_checkpoint(tmp_path / "c.pth", case("sde_ddpmpp_vp"))
    with pytest.raises(CheckpointError, match=r"NCSNpp needs nf, ch_mult, .*; give .* preset, one of cifar10_"):
        fastdiff.load(tmp_path / "c.pth")


@pytest.mark.parametrize("bin", [False, True], ids=["safetensors", "bin"])
def test_diffusers_folder(case, bin, tmp_path):
    data = case("diffusers_unet2d_ddpm")
    diffusers_folder(tmp_path / "m", data, bin=bin)
    same(fastdiff.load(tmp_path / "m"), data.model())
    if not bin:  # the file alone, its configuration beside it
        same(fastdiff.load(tmp_path / "m" / "diffusion_pytorch_model.safetensors"), data.model())


def test_diffusers_pipeline(case, tmp_path):
    """The scheduler says schedule and prediction."""
    data = case("diffusers_unet2d_ddpm")
    for i, (changes, schedule, prediction) in enumerate(
        (
            ({}, DDPM(), Prediction("eps")),
            ({"beta_end": 0.01, "prediction_type": "v_prediction"}, DDPM(beta_end=0.01), Prediction("v")),
            ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500}, DDPM(500, law="cosine"), Prediction()),
            ({"_class_name": "CMStochasticIterativeScheduler"}, EDM(), Prediction("consistency", time_scale=1000.0)),
        )
    ):
        diffusers_folder(tmp_path / str(i), data, DDPM_SCHEDULER | changes)
        model = fastdiff.load(tmp_path / str(i))
        assert model.schedule == schedule and model.prediction == prediction
        assert all(torch.equal(v, model.state[k]) for k, v in data.model().state.items())
    diffusers_folder(tmp_path / "bad", data, DDPM_SCHEDULER | {"beta_schedule": "sigmoid"})
    with pytest.raises(CheckpointError, match=r"scheduler: beta_schedule 'sigmoid' is not read"):
        fastdiff.load(tmp_path / "bad")


def test_told_by_content(case, tmp_path):
    """Names do not matter."""
    data = case("edm_adm_cond")
    edm_pickle(tmp_path / "a.pkl", data)
    shutil.copy(tmp_path / "a.pkl", tmp_path / "a.safetensors")
    same(fastdiff.load(tmp_path / "a.safetensors"), data.model())
    data.model().save(tmp_path / "ours.pt")
    same(fastdiff.load(tmp_path / "ours.pt"), data.model())


def test_edm_state_dict_with_arguments(case, tmp_path):
    """A bare state dict does not say how its network was built."""
    data = case("edm_ncsnpp_ve")
    save_file({k: v.contiguous() for k, v in data.weights.items()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"names are those of edm, whose state dicts do not say how"):
        fastdiff.load(tmp_path / "w.safetensors")
    same(fastdiff.load(tmp_path / "w.safetensors", class_name="VEPrecond", **data.constructor), data.model())


def test_arguments_that_are_not_asked_for(case, tmp_path):
    """What says itself how it was built takes no arguments, rather than ignoring them."""
    data = case("edm_adm_cond")
    edm_pickle(tmp_path / "n.pkl", data)
    diffusers_folder(tmp_path / "m", case("diffusers_unet2d_ddpm"))
    data.model().save(tmp_path / "ours.safetensors")
    for source in (tmp_path / "n.pkl", tmp_path / "m", tmp_path / "ours.safetensors", data.model()):
        with pytest.raises(CheckpointError, match="says itself what it is; leave img_size out"):
            fastdiff.load(source, img_size=3)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["init_conv.weight", "downs.0.0.block1.proj.weight"], "lucidrains.*norms are RMS"),
        (["inner_model.u_net.d_blocks.0.0.weight"], "k-diffusion.*GELU"),
        (["unet.emb_gain", "unet.out_gain"], "EDM2.*no norms or biases"),
        (["linear.weight"], "of another program"),
    ],
)
def test_what_is_not_read_is_named(names, words, tmp_path):
    torch.save({n: torch.ones(2, 2) for n in names}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=words):
        fastdiff.load(tmp_path / "m.pt")


def test_weights_that_do_not_fit(case, tmp_path):
    """Everything missing, unexpected or of another shape is named, grouped."""
    data = case("diffusers_unet2d_ddpm")
    state = dict(data.weights)
    del state["conv_in.bias"], state["conv_out.weight"]
    state["extra"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"2 missing: conv_in.bias, conv_out.weight; 1 unexpected: extra"):
        dataclasses.replace(data, weights=state).model()
    state = data.weights | {"conv_in.bias": torch.ones(5), "mid_block.attentions.0.to_k.weight": torch.ones(2, 24)}
    with pytest.raises(CheckpointError, match=r"2 of another shape: conv_in.bias \[5\] where \[16\] belongs, mid_block"):
        dataclasses.replace(data, weights=state).model()
    state = data.weights | {"conv_in.bias": torch.full((16,), float("nan"))}
    with pytest.raises(CheckpointError, match=r"1 not finite: conv_in.bias \(16 of 16 values\)"):
        dataclasses.replace(data, weights=state).model()


@pytest.mark.parametrize(
    ("family", "class_name", "config", "words"),
    [
        ("gan", None, {}, "family: 'gan' is not known; use one of diffusers, edm, openai, score_sde"),
        ("edm", "EDM2Precond", {}, "class_name: 'EDM2Precond' is no network of EDM"),
        ("edm", None, {}, "EDMPrecond needs img_resolution"),
        ("edm", None, {"img_resolution": 8, "model_type": "DiT"}, "model_type 'DiT' is not read"),
        ("edm", None, {"img_resolution": 8, "num_block": 3}, "DhariwalUNet has no option num_block; it has .*num_blocks"),
        ("openai", "SuperResModel", {}, "class_name: 'SuperResModel' is not read"),
        ("openai", None, {"preset": "dalle"}, "preset 'dalle' is not known; use one of 64x64_diffusion"),
        ("score_sde", "DDPM", {}, "class_name: 'DDPM' is not read"),
        ("diffusers", "UNet2DConditionModel", {}, "class_name: 'UNet2DConditionModel' is not read"),
        (
            "diffusers",
            None,
            {"down_block_types": ("KDownBlock2D",)},
            "down block 'KDownBlock2D' is not read",
        ),
    ],
)
def test_bad_requests(family, class_name, config, words):
    with pytest.raises(ValueError, match=words):
        fastdiff.from_state_dict({}, family, class_name, **config)


def test_back_to_diffusers(case, tmp_path):
    """Through diffusers' folder and back: the same model. What it cannot express is named."""
    model = case("diffusers_unet2d_ddpm").model()
    fastdiff.to_diffusers(model, tmp_path / "p")
    same(fastdiff.load(tmp_path / "p"), model)
    with pytest.raises(FileExistsError):
        fastdiff.to_diffusers(model, tmp_path / "p")
    for name, words in (("edm_adm_cond", "no group_channels 4"), ("sde_ddpmpp_vp", "no attention_up 'last'")):
        with pytest.raises(CheckpointError, match=f"network: diffusers' UNet2DModel has {words}"):
            fastdiff.to_diffusers(case(name).model(), tmp_path / name)
    consistency = dataclasses.replace(model, schedule=EDM(), prediction=Prediction("consistency"))
    with pytest.raises(CheckpointError, match="EDM with prediction 'consistency' has no place in DDPMScheduler"):
        fastdiff.to_diffusers(consistency, tmp_path / "cm")
    with pytest.raises(TypeError, match=r"only a fastdiff\.UNet becomes a UNet2DModel"):
        fastdiff.to_diffusers(fastdiff.wrap(lambda x, t: x, schedule=DDPM()), tmp_path / "net")

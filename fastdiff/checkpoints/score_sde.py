"""score_sde_pytorch: NCSNpp (ncsnpp and ddpmpp configurations) under the VP, sub-VP and VE SDEs."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fastdiff.checkpoints.layout import REQUIRED, About, Convention, Layout, build, heads, options, require, steps
from fastdiff.denoiser import Prediction
from fastdiff.schedules import VE, VP, SubVP
from fastdiff.unet import UNet, UNetConfig

RESIDUAL = {
    "GroupNorm_0": "norm0",
    "Conv_0": "conv0",
    "Dense_0": "condition",
    "GroupNorm_1": "norm1",
    "Conv_1": "conv1",
    "Conv_2": "skip",
}
MODEL: dict[str, Any] = {
    "nf": REQUIRED,
    "ch_mult": REQUIRED,
    "num_res_blocks": REQUIRED,
    "attn_resolutions": REQUIRED,
    "dropout": 0.0,
    "name": "ncsnpp",
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "resamp_with_conv": True,
    "conditional": True,
    "fir": False,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "none",
    "progressive_combine": "sum",
    "attention_type": "ddpm",
    "embedding_type": "positional",
    "init_scale": 0.0,
    "fourier_scale": 16,
    "conv_size": 3,
    "scale_by_sigma": None,
    "sigma_min": 0.01,
    "sigma_max": 50.0,
    "num_scales": 1000,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "ema_rate": 0.0,
}
CIFAR: dict[str, Any] = {"nf": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 4, "attn_resolutions": (16,), "dropout": 0.1}
DDPMPP = CIFAR | {"embedding_type": "positional", "fir": False}
NCSNPP = CIFAR | {
    "embedding_type": "fourier",
    "fir": True,
    "progressive_input": "residual",
    "scale_by_sigma": True,
    "sigma_max": 50.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    f"cifar10_{name}{deep}_continuous{sub}": {
        "data": {"image_size": 32, "num_channels": 3, "centered": name == "ddpmpp"},
        "training": {"sde": sde, "continuous": True},
        "model": model | ({"num_res_blocks": 8} if deep else {}),
    }
    for name, model, sde, sub in (
        ("ddpmpp", DDPMPP, "vpsde", ""),
        ("ddpmpp", DDPMPP, "subvpsde", "_subvp"),
        ("ncsnpp", NCSNPP, "vesde", ""),
    )
    for deep in ("", "_deep")
}
SDES = {"vp": "vp", "vpsde": "vp", "subvp": "subvp", "subvpsde": "subvp", "ve": "ve", "vesde": "ve"}
EXPECTED = {  # what the network has no other way for
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "conditional": True,
    "attention_type": "ddpm",
    "resblock_type": "biggan",
    "progressive_combine": "sum",
    "conv_size": 3,
}


def read(state: Mapping[str, Any], class_name: str | None, config: dict[str, Any]) -> tuple[UNet, Layout, About]:
    """The network without weights, where they are, and its SDE."""
    class_name = class_name or "NCSNpp"
    require(class_name == "NCSNpp", f"class_name: {class_name!r} is not read; of score_sde's networks only NCSNpp is")
    config = dict(config)
    preset = config.pop("preset", None)
    require(preset is None or preset in PRESETS, f"config: preset {preset!r} is not known; use one of {', '.join(PRESETS)}")
    config = (PRESETS[preset] if preset else {}) | config
    config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    data, training, wrapper = (config.get(k) or {} for k in ("data", "training", "wrapper"))
    model = {k: v for k, v in config.get("model", {}).items() if k in MODEL}
    v = options(model, MODEL, "NCSNpp", PRESETS)
    for name, value in EXPECTED.items():
        require(v[name] == value, f"config: model.{name} {v[name]!r} is not read, only {value!r} is")
    network = build(_architecture(v, data))
    return network, _layout(network, v), _about(v, data, training, wrapper)


def _architecture(v: Mapping[str, Any], data: Mapping[str, Any]) -> UNetConfig:
    inputs = {"none": "none", "input_skip": "skip", "residual": "residual"}
    outputs = {"none": "none", "output_skip": "skip"}
    for name, known in (("progressive_input", inputs), ("progressive", outputs)):
        require(v[name] in known, f"config: model.{name} {v[name]!r} is not read, only {', '.join(known)} are")
    require(v["embedding_type"] in ("positional", "fourier"), f"config: embedding_type {v['embedding_type']!r} is not known")
    require(v["fir"] or v["progressive_input"] != "residual", "config: progressive_input residual without fir is not read")
    require("image_size" in data, "config: data needs image_size; give the configuration the network was built with")
    fourier = v["embedding_type"] == "fourier"
    return UNetConfig.ddpmpp(
        resolution=data["image_size"],
        in_channels=data.get("num_channels", 3),
        out_channels=data.get("num_channels", 3),
        channels=v["nf"],
        multipliers=v["ch_mult"],
        blocks=v["num_res_blocks"],
        attention=v["attn_resolutions"],
        dropout=v["dropout"],
        skip_scale=math.sqrt(0.5) if v["skip_rescale"] else 1.0,
        filter=v["fir_kernel"] if v["fir"] else (1, 1),
        embedding=v["embedding_type"],
        time_multiplier=2 if fourier else 1,
        input_pyramid=inputs[v["progressive_input"]],
        output_pyramid=outputs[v["progressive"]],
    )


def _about(v: Mapping[str, Any], data: Mapping[str, Any], training: Mapping[str, Any], wrapper: Mapping[str, Any]) -> About:
    fourier = v["embedding_type"] == "fourier"
    name = wrapper.get("sde") or training.get("sde") or ("ve" if fourier else "vp")
    require(name in SDES, f"config: sde {name!r} is not known; use one of {', '.join(SDES)}")
    continuous = wrapper.get("continuous", training.get("continuous", True))
    require(continuous, "config: training.continuous False is not read; its labels are indices of a discrete SDE")
    own = dict(v) | {k: wrapper[k] for k in ("beta_min", "beta_max", "sigma_min", "sigma_max") if k in wrapper}
    unit = not data.get("centered", False)
    if SDES[name] == "ve":
        divided = v["scale_by_sigma"] if v["scale_by_sigma"] is not None else True
        require(fourier and divided, "config: a VE model is read with Fourier features and scale_by_sigma only")
        # Images in [0, 1] at noise level s are images in [-1, 1] at level 2 s.
        k = 2.0 if unit else 1.0
        schedule = VE(k * own["sigma_min"], k * own["sigma_max"])
        convention = Convention(log_level=True, divided=True, unit_range=unit)
        return About(schedule, Prediction("ve", time_scale=1 / k), convention=convention)
    require(not fourier, "config: a VP or sub-VP model is read with positional embeddings only")
    require(not v["scale_by_sigma"], "config: scale_by_sigma is read for VE models only")
    require(not unit, "config: data.centered False is read for VE models only")
    kind = {"vp": VP, "subvp": SubVP}[SDES[name]]
    return About(kind(own["beta_min"], own["beta_max"]), Prediction("eps", time_scale=999.0))


def _layout(network: UNet, v: Mapping[str, Any]) -> Layout:
    """all_modules.<i>, numbered in the order of execution."""
    layout = Layout(ignored=r"^(module\.)?sigmas$")
    numbers = iter(range(10**6))

    def following() -> str:
        return f"all_modules.{next(numbers)}"

    if v["embedding_type"] == "fourier":
        layout.tensor("time.frequencies", f"{following()}.W", lambda w: w)
    for ours in ("time0", "time1", "conv_in"):
        layout.module(ours, following())

    def residual(ours: str) -> None:
        layout.block(ours, following(), RESIDUAL)
        if heads(network, ours):
            _attention(layout, f"{ours}.attention", following())

    pyramid = iter(range(len(network.pyramid)))
    for i, _, _, index in steps(network.down, 0, 1):
        residual(f"down.{i}")
        if index < 0 and len(network.pyramid):
            leaf = "Conv_0" if v["progressive_input"] == "input_skip" else "Conv2d_0"
            layout.module(f"pyramid.{next(pyramid)}.conv", f"{following()}.{leaf}")
    residual("middle.0")
    residual("middle.1")
    images = iter(range(len(network.images)))
    for i, _, _, index in steps(network.up, 0, -1):
        if index < 0 and len(network.images):
            n = next(images)
            layout.module(f"images.{n}.norm", following())
            layout.module(f"images.{n}.conv", following())
        residual(f"up.{i}")
    layout.module("norm_out", following())
    layout.module("conv_out", following())
    return layout


def _attention(layout: Layout, ours: str, theirs: str) -> None:
    """NIN_0 ... NIN_3 are q, k, v and the projection out, matrices [in, out]."""
    layout.module(f"{ours}.norm", f"{theirs}.GroupNorm_0")
    q, k, v, out = (f"{theirs}.NIN_{i}" for i in range(4))
    layout.tensor(f"{ours}.qkv.weight", (f"{q}.W", f"{k}.W", f"{v}.W"), lambda *w: torch.cat(w, 1).T)
    layout.tensor(f"{ours}.qkv.bias", (f"{q}.b", f"{k}.b", f"{v}.b"), lambda *b: torch.cat(b))
    layout.tensor(f"{ours}.proj.weight", f"{out}.W", lambda w: w.T)
    layout.tensor(f"{ours}.proj.bias", f"{out}.b", lambda b: b)

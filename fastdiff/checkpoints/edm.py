"""NVlabs EDM: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM) under the VP, VE, iDDPM and EDM preconditioners."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.layout import REQUIRED, About, Layout, build, heads, options, require, steps, swap_halves
from fastdiff.denoiser import Prediction
from fastdiff.schedules import DDPM, EDM, VE, VP
from fastdiff.unet import UNet, UNetConfig

RESIDUAL = {
    "norm0": "norm0",
    "conv0": "conv0",
    "affine": "condition",
    "norm1": "norm1",
    "conv1": "conv1",
    "skip": "skip",
    "norm2": "attention.norm",
    "proj": "attention.proj",
}
NETWORKS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "img_resolution": REQUIRED,
        "in_channels": 3,
        "out_channels": 3,
        "label_dim": 0,
        "augment_dim": 0,
        "model_channels": 128,
        "channel_mult": (1, 2, 2, 2),
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": (16,),
        "dropout": 0.10,
        "label_dropout": 0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": (1, 1),
    },
    "DhariwalUNet": {
        "img_resolution": REQUIRED,
        "in_channels": 3,
        "out_channels": 3,
        "label_dim": 0,
        "augment_dim": 0,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "channel_mult_emb": 4,
        "num_blocks": 3,
        "attn_resolutions": (32, 16, 8),
        "dropout": 0.10,
        "label_dropout": 0,
    },
}
PRECONDITIONERS: dict[str, dict[str, Any]] = {
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0, "model_type": "SongUNet"},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"},
    "EDMPrecond": {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
}
SHARED = {"img_resolution": REQUIRED, "img_channels": 3, "label_dim": 0, "use_fp16": False}
CLASSES = (*PRECONDITIONERS, *NETWORKS)


def read(state: Mapping[str, Any], class_name: str | None, config: dict[str, Any]) -> tuple[UNet, Layout, About]:
    """The network without weights, where they are, and what its preconditioner says."""
    class_name = class_name or "EDMPrecond"
    require(class_name in CLASSES, f"class_name: {class_name!r} is no network of EDM; use one of {', '.join(CLASSES)}")
    if class_name in NETWORKS:
        return *_network(class_name, config, ""), _about("EDMPrecond", PRECONDITIONERS["EDMPrecond"])
    known = SHARED | PRECONDITIONERS[class_name]
    own = options({k: v for k, v in config.items() if k in known}, known, class_name)
    inner = {k: v for k, v in config.items() if k not in known}
    inner |= {"img_resolution": own["img_resolution"], "label_dim": own["label_dim"]}
    inner["in_channels"] = inner["out_channels"] = own["img_channels"]
    if class_name == "iDDPMPrecond":
        inner["out_channels"] = 2 * own["img_channels"]
    name = own["model_type"]
    require(name in NETWORKS, f"config: model_type {name!r} is not read; use one of {', '.join(NETWORKS)}")
    return *_network(name, inner, "model."), _about(class_name, own)


def _about(name: str, own: Mapping[str, Any]) -> About:
    if name == "VPPrecond":
        vp = VP(own["beta_min"], own["beta_min"] + own["beta_d"], t_min=own["epsilon_t"])
        scale = float(own["M"] - 1)
        levels = EDM(float(vp.ratio(vp.t_min)), float(vp.ratio(1.0)))
        return About(levels, Prediction("eps", time_scale=scale, trained=vp))
    if name == "VEPrecond":
        return About(VE(own["sigma_min"], own["sigma_max"]), Prediction("ve", time_scale=0.5))
    if name == "iDDPMPrecond":
        require(own["C_1"] == 0.001 and own["C_2"] == 0.008, "config: iDDPMPrecond is read with C_1 0.001, C_2 0.008 only")
        ddpm = DDPM(T=own["M"], law="cosine")
        levels = EDM(float(ddpm.ratio(0)), float(ddpm.ratio(own["M"] - 1)))
        time = own["M"] - 1  # the network counts to M - 1 whatever M is
        require(time == 999, "config: iDDPMPrecond is read with M = 1000 only")
        return About(levels, Prediction("eps", trained=ddpm, rounded=True, learned_variance=True))
    low = own["sigma_min"] or 0.002
    high = own["sigma_max"] if math.isfinite(own["sigma_max"]) else 80.0
    return About(EDM(low, high), Prediction("edm", sigma_data=own["sigma_data"]))


def _network(name: str, config: Mapping[str, Any], prefix: str) -> tuple[UNet, Layout]:
    v = options(config, NETWORKS[name], name)
    song = name == "SongUNet"
    shared: dict[str, Any] = {
        "resolution": v["img_resolution"],
        "in_channels": v["in_channels"],
        "out_channels": v["out_channels"],
        "channels": v["model_channels"],
        "multipliers": v["channel_mult"],
        "blocks": v["num_blocks"],
        "attention": v["attn_resolutions"],
        "dropout": v["dropout"],
        "embedding_multiplier": v["channel_mult_emb"],
        "labels": v["label_dim"],
        "label_optional": v["label_dim"] > 0,
        "augment": v["augment_dim"],
        "group_channels": 4,
        "resampling": "block",
    }
    network = build(_song(shared, v) if song else UNetConfig.adm(**shared))
    layout = Layout(ignored=r"resample_filter$")
    theirs = Names(network, prefix)
    theirs.mapping(layout, song)
    theirs.encoder(layout)
    theirs.decoder(layout, song)
    return network, layout


def _song(shared: dict[str, Any], v: Mapping[str, Any]) -> UNetConfig:
    pyramids = {"standard": "none", "skip": "skip", "residual": "residual"}
    require(v["encoder_type"] in pyramids, f"config: encoder_type {v['encoder_type']!r} is not known")
    require(v["decoder_type"] in ("standard", "skip"), f"config: decoder_type {v['decoder_type']!r} is not known")
    require(v["embedding_type"] in ("positional", "fourier"), f"config: embedding_type {v['embedding_type']!r} is not known")
    return UNetConfig.ddpmpp(
        **shared,
        embedding=v["embedding_type"],
        time_multiplier=v["channel_mult_noise"],
        filter=v["resample_filter"],
        input_pyramid=pyramids[v["encoder_type"]],
        output_pyramid=pyramids[v["decoder_type"]],
        label_input=v["label_dim"] > 0,
    )


class Names:
    """What EDM calls the modules: by half, resolution and role, as in enc.16x16_block0."""

    def __init__(self, network: UNet, prefix: str):
        self.network, self.prefix, self.config = network, prefix, network.config

    def at(self, half: str, level: int, role: str) -> str:
        resolution = self.config.resolution >> level
        return f"{self.prefix}{half}.{resolution}x{resolution}_{role}"

    def mapping(self, layout: Layout, song: bool) -> None:
        p = self.prefix
        layout.module("time0", f"{p}map_layer0")
        layout.module("time1", f"{p}map_layer1")
        layout.module("augment", f"{p}map_augment")
        layout.tensor("time.frequencies", f"{p}map_noise.freqs", lambda w: w)
        classes = self.config.labels
        if not song:
            layout.tensor("time0.weight", f"{p}map_layer0.weight", swap_halves)
            layout.tensor("label.weight", f"{p}map_label.weight", lambda w: w.T)
        elif classes:
            # map_label acts on one-hot vectors times sqrt(classes); its bias always acts, as map_layer0's own does.
            layout.tensor("label.weight", f"{p}map_label.weight", lambda w: w.T * math.sqrt(classes))
            names = (f"{p}map_layer0.bias", f"{p}map_layer0.weight", f"{p}map_label.bias")
            layout.tensor("time0.bias", names, _with_bias)

    def residual(self, layout: Layout, ours: str, theirs: str) -> None:
        layout.block(ours, theirs, RESIDUAL)
        if n := heads(self.network, ours):
            layout.qkv(f"{ours}.attention.qkv", f"{theirs}.qkv", n, "edm")

    def encoder(self, layout: Layout) -> None:
        layout.module("conv_in", self.at("enc", 0, "conv"))
        for i, _, level, index in steps(self.network.down, 0, 1):
            self.residual(layout, f"down.{i}", self.at("enc", level, "down" if index < 0 else f"block{index}"))
        for i in range(len(self.network.pyramid)):
            role = {"skip": "aux_skip", "residual": "aux_residual"}[self.config.input_pyramid]
            layout.module(f"pyramid.{i}.conv", self.at("enc", i + 1, role))

    def decoder(self, layout: Layout, song: bool) -> None:
        last = len(self.config.multipliers) - 1
        for i in range(2):
            self.residual(layout, f"middle.{i}", self.at("dec", last, f"in{i}"))
        for i, _, level, index in steps(self.network.up, last, -1):
            self.residual(layout, f"up.{i}", self.at("dec", level, "up" if index < 0 else f"block{index}"))
        for i in range(len(self.network.images)):
            layout.module(f"images.{i}.norm", self.at("dec", last - i, "aux_norm"))
            layout.module(f"images.{i}.conv", self.at("dec", last - i, "aux_conv"))
        layout.module("norm_out", self.at("dec", 0, "aux_norm") if song else f"{self.prefix}out_norm")
        layout.module("conv_out", self.at("dec", 0, "aux_conv") if song else f"{self.prefix}out_conv")


def _with_bias(bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """The bias of a layer whose input is always shifted."""
    return (bias.double() + torch.mv(weight.double(), shift.double())).float()

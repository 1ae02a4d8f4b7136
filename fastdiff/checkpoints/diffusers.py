"""Hugging Face diffusers: UNet2DModel, and the schedulers of its unconditional pipelines."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fastdiff.checkpoints.layout import About, Convention, Layout, build, heads, options, require, steps, swap_halves
from fastdiff.denoiser import Prediction
from fastdiff.schedules import DDPM, EDM, VE, Schedule
from fastdiff.unet import UNet, UNetConfig

RESIDUAL = {
    "norm1": "norm0",
    "conv1": "conv0",
    "time_emb_proj": "condition",
    "norm2": "norm1",
    "conv2": "conv1",
    "conv_shortcut": "skip",
}
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "add_attention": True,
}
PLAIN = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
PLAIN_UP = {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}
SKIP = {"SkipDownBlock2D": False, "AttnSkipDownBlock2D": True}
SKIP_UP = {"SkipUpBlock2D": False, "AttnSkipUpBlock2D": True}


def read(state: Mapping[str, Any], class_name: str | None, config: dict[str, Any]) -> tuple[UNet, Layout, About]:
    """The network without weights, where they are, and what its scheduler (config["scheduler"]) says."""
    class_name = class_name or "UNet2DModel"
    require(
        class_name == "UNet2DModel", f"class_name: {class_name!r} is not read; of diffusers' networks only UNet2DModel is"
    )
    config = {k: x for k, x in config.items() if not k.startswith("_")}
    scheduler = config.pop("scheduler", None)
    v = options(config, DEFAULTS, "UNet2DModel")
    ncsn = v["down_block_types"][0] in SKIP or v["time_embedding_type"] == "fourier"
    network = build(_ncsn(v) if ncsn else _architecture(v))
    return network, names(network, v, state), _about(v, scheduler)


def _levels(types: tuple[str, ...], known: Mapping[str, bool], what: str) -> list[bool]:
    for name in types:
        require(name in known, f"config: {what} {name!r} is not read here, only {', '.join(known)} are")
    return [known[name] for name in types]


def _shared(v: Mapping[str, Any], down: list[bool], up: list[bool]) -> dict[str, Any]:
    require(v["mid_block_type"] == "UNetMidBlock2D", f"config: mid_block_type {v['mid_block_type']!r} is not read")
    require(v["act_fn"] in ("silu", "swish"), f"config: act_fn {v['act_fn']!r} is not read, only silu is")
    require(
        v["class_embed_type"] is None, f"config: class_embed_type {v['class_embed_type']!r} is not read, only a table is"
    )
    require(len(up) == len(down) == len(v["block_out_channels"]), "config: as many up and down blocks as block_out_channels")
    require(down == up[::-1], "config: attention on other levels on the way up than on the way down is not read")
    size, channels = v["sample_size"], v["block_out_channels"]
    if isinstance(size, (tuple, list)) and len(set(size)) == 1:
        size = size[0]
    require(isinstance(size, int), f"config: sample_size {size!r} is not read; give the height and width as one number")
    dimension = v["time_embedding_dim"] or 4 * channels[0]
    require(dimension % channels[0] == 0, f"config: time_embedding_dim {dimension} is no multiple of {channels[0]}")
    scale_shift = v["resnet_time_scale_shift"]
    require(scale_shift in ("default", "scale_shift"), f"config: resnet_time_scale_shift {scale_shift!r} is not read")
    return {
        "resolution": size,
        "in_channels": v["in_channels"],
        "out_channels": v["out_channels"],
        "channels": channels[0],
        "multipliers": tuple(c / channels[0] if c % channels[0] else c // channels[0] for c in channels),
        "blocks": v["layers_per_block"],
        "attention": tuple(size >> i for i, here in enumerate(down) if here),
        "attention_middle": _middle(v),
        "head_channels": v["attention_head_dim"] or 0,
        "dropout": v["dropout"],
        "eps": v["norm_eps"],
        "conditioning": "add" if scale_shift == "default" else "scale_shift",
        "embedding_multiplier": dimension // channels[0],
        "labels": v["num_class_embeds"] or 0,
    }


def _architecture(v: Mapping[str, Any]) -> UNetConfig:
    down = _levels(v["down_block_types"], PLAIN, "down block")
    up = _levels(v["up_block_types"], PLAIN_UP, "up block")
    groups = v["norm_num_groups"]
    require(isinstance(groups, int), f"config: norm_num_groups {groups!r} is not read with these blocks")
    require(v["attn_norm_num_groups"] in (None, groups), "config: attn_norm_num_groups must be norm_num_groups to be read")
    require(v["mid_block_scale_factor"] == 1, "config: mid_block_scale_factor is read as 1 only with these blocks")
    require(
        v["time_embedding_type"] == "positional", f"config: time_embedding_type {v['time_embedding_type']!r} is not read"
    )
    return UNetConfig(**_shared(v, down, up), groups=groups, resampling=_resampling(v), frequency_shift=v["freq_shift"])


def _middle(v: Mapping[str, Any]) -> str:
    """The attention in the middle; scale_shift without attn_norm_num_groups leaves it without its norm."""
    if not v["add_attention"]:
        return "none"
    return "norm" if v["attn_norm_num_groups"] or v["resnet_time_scale_shift"] == "default" else "bare"


def _resampling(v: Mapping[str, Any]) -> str:
    """How all levels but the last are halved; block types without attention name it themselves."""
    types = [*v["down_block_types"][:-1], *v["up_block_types"][:-1]]
    named = {"AttnDownBlock2D": v["downsample_type"], "AttnUpBlock2D": v["upsample_type"]}
    named |= {"ResnetDownsampleBlock2D": "resnet", "ResnetUpsampleBlock2D": "resnet"}
    kinds = {named.get(t, "conv") for t in types} or {"conv"}
    require(len(kinds) == 1 and kinds <= {"conv", "resnet"}, f"config: resampling by {sorted(map(str, kinds))} is not read")
    if kinds == {"resnet"}:
        return "block"
    require(v["downsample_padding"] in (0, 1), f"config: downsample_padding {v['downsample_padding']} is not read")
    return "conv" if v["downsample_padding"] else "conv_end"


def _ncsn(v: Mapping[str, Any]) -> UNetConfig:
    """NCSN++ with its fixed filter, groups, input and output pyramids."""
    down = _levels(v["down_block_types"], SKIP, "down block")
    up = _levels(v["up_block_types"], SKIP_UP, "up block")
    require(v["time_embedding_type"] == "fourier", "config: these blocks are read with time_embedding_type fourier only")
    scale = v["mid_block_scale_factor"]
    require(abs(scale - math.sqrt(2)) < 1e-3, f"config: mid_block_scale_factor {scale} is not read with these blocks")
    require(v["norm_num_groups"] is None, "config: norm_num_groups must be None with these blocks")
    return UNetConfig(
        **_shared(v, down, up),
        group_channels=4,
        attention_up="last",
        resampling="block",
        project_resampled=True,
        skip_scale=math.sqrt(0.5),
        embedding="fourier",
        time_multiplier=2,
        filter=(1, 3, 3, 1),
        input_pyramid="skip",
        output_pyramid="skip",
    )


def names(network: UNet, v: Mapping[str, Any], state: Mapping[str, Any]) -> Layout:
    """Where each of our tensors is; `state` tells whether attention has the names of before 2023."""
    ncsn = network.config.embedding == "fourier"
    layout = Layout(ignored=r"^time_proj\.W$")
    layout.module("time0", "time_embedding.linear_1")
    layout.module("time1", "time_embedding.linear_2")
    if v["flip_sin_to_cos"] and not ncsn:  # Fourier features have their sines first whatever it says
        layout.tensor("time0.weight", "time_embedding.linear_1.weight", swap_halves)
    layout.tensor("time.frequencies", "time_proj.weight", lambda w: w)
    layout.module("label", "class_embedding")
    layout.module("norm_out", "conv_norm_out")
    old = any(".attentions." in str(k) and str(k).endswith(".query.weight") for k in state)

    def attention(ours: str, theirs: str) -> None:
        own = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
        q, k, x, out = (f"{theirs}.{n}" for n in own)
        layout.module(f"{ours}.norm", f"{theirs}.group_norm")
        layout.module(f"{ours}.proj", out)
        for leaf in ("weight", "bias"):
            layout.tensor(f"{ours}.qkv.{leaf}", tuple(f"{n}.{leaf}" for n in (q, k, x)), lambda *w: torch.cat(w))

    def residual(ours: str, theirs: str, attention_at: str = "") -> None:
        layout.block(ours, theirs, RESIDUAL)
        if heads(network, ours):
            attention(f"{ours}.attention", attention_at)

    for i, _, level, index in steps(network.down, 0, 1):
        if index < 0:
            theirs = f"down_blocks.{level - 1}"
            if network.config.resampling != "block":
                layout.module(f"down.{i}.conv", f"{theirs}.downsamplers.0.conv")
            else:
                residual(f"down.{i}", f"{theirs}.resnet_down" if ncsn else f"{theirs}.downsamplers.0")
        else:
            theirs = f"down_blocks.{level}"
            residual(f"down.{i}", f"{theirs}.resnets.{index}", f"{theirs}.attentions.{index}")
    for i in range(len(network.pyramid)):
        layout.module(f"pyramid.{i}.conv", f"down_blocks.{i}.skip_conv")
    residual("middle.0", "mid_block.resnets.0", "mid_block.attentions.0")
    residual("middle.1", "mid_block.resnets.1")
    last = len(v["block_out_channels"]) - 1
    for i, _, level, index in steps(network.up, last, -1):
        if index < 0:
            theirs = f"up_blocks.{last - level - 1}"
            if network.config.resampling != "block":
                layout.module(f"up.{i}.conv", f"{theirs}.upsamplers.0.conv")
            else:
                residual(f"up.{i}", f"{theirs}.resnet_up" if ncsn else f"{theirs}.upsamplers.0")
        else:
            theirs = f"up_blocks.{last - level}"
            # NCSN++'s only attention of a level is its first and last.
            residual(f"up.{i}", f"{theirs}.resnets.{index}", f"{theirs}.attentions.{0 if ncsn else index}")
    for i in range(len(network.images)):
        layout.module(f"images.{i}.norm", f"up_blocks.{i}.skip_norm")
        layout.module(f"images.{i}.conv", f"up_blocks.{i}.skip_conv")
    return layout


def _about(v: Mapping[str, Any], scheduler: Mapping[str, Any] | None) -> About:
    if v["time_embedding_type"] == "fourier":
        low, high = ((scheduler or {}).get(k, d) for k, d in (("sigma_min", 0.01), ("sigma_max", 1348.0)))
        # Images lie in [0, 1]. Where the network centres them, they are images in [-1, 1] at twice the level.
        unit = v["center_input_sample"]
        k = 2.0 if unit else 1.0
        convention = Convention(log_level=True, divided=True, unit_range=unit, unit_images=not unit)
        info = {} if scheduler is None else {"scheduler": _plain(scheduler)}
        return About(VE(k * low, k * high), Prediction("ve", time_scale=1 / k), convention=convention, info=info)
    require(not v["center_input_sample"], "config: center_input_sample is not read")
    if scheduler is None:
        return About(DDPM(), Prediction("eps"))
    schedule, prediction, family = _scheduler(scheduler)
    return About(schedule, prediction, family, info={"scheduler": _plain(scheduler)})


def _plain(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in what JSON has; anything else by its name."""

    def value(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [value(y) for y in x]
        return x if x is None or isinstance(x, (bool, int, float, str)) else type(x).__name__

    return {k: value(x) for k, x in scheduler.items() if k == "_class_name" or not k.startswith("_")}


def _scheduler(s: Mapping[str, Any]) -> tuple[Schedule, Prediction, str]:
    """Schedule and prediction of a scheduler's configuration."""
    name = s.get("_class_name", "DDPMScheduler")
    if name == "CMStochasticIterativeScheduler":
        prediction = Prediction("consistency", sigma_data=s.get("sigma_data", 0.5), time_scale=1000.0)
        return EDM(s.get("sigma_min", 0.002), s.get("sigma_max", 80.0)), prediction, "consistency"
    if name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
        return (
            EDM(s.get("sigma_min", 0.002), s.get("sigma_max", 80.0)),
            Prediction("edm", s.get("sigma_data", 0.5)),
            "diffusion",
        )
    require("num_train_timesteps" in s and "beta_schedule" in s, f"scheduler: {name} is not read")
    laws = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    law = s["beta_schedule"]
    require(law in laws, f"scheduler: beta_schedule {law!r} is not read, only {', '.join(laws)} are")
    require(s.get("trained_betas") is None, "scheduler: trained_betas are not read")
    require(not s.get("rescale_betas_zero_snr"), "scheduler: rescale_betas_zero_snr is not read")
    kinds = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    kind = s.get("prediction_type", "epsilon")
    require(kind in kinds, f"scheduler: prediction_type {kind!r} is not read, only {', '.join(kinds)} are")
    schedule = DDPM(s["num_train_timesteps"], s.get("beta_start", 1e-4), s.get("beta_end", 0.02), laws[law])
    learned = str(s.get("variance_type", "")).startswith("learned")
    return schedule, Prediction(kinds[kind], learned_variance=learned), "diffusion"

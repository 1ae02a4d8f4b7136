"""OpenAI improved-diffusion, guided-diffusion and consistency_models: UNetModel, and what its shapes tell."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.layout import REQUIRED, About, Layout, build, heads, options, require, shape_of, steps, swap_halves
from fastdiff.checkpoints.stored import Stored
from fastdiff.denoiser import Prediction
from fastdiff.schedules import DDPM, EDM
from fastdiff.unet import UNet, UNetConfig

RESIDUAL = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "condition",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
ATTENTION = {"norm": "attention.norm", "proj_out": "attention.proj"}
ARGUMENTS: dict[str, Any] = {
    "image_size": REQUIRED,
    "in_channels": 3,
    "model_channels": REQUIRED,
    "out_channels": 3,
    "num_res_blocks": REQUIRED,
    "attention_resolutions": REQUIRED,  # factors of downsampling
    "dropout": 0.0,
    "channel_mult": (1, 2, 4, 8),
    "conv_resample": True,
    "dims": 2,
    "num_classes": None,
    "use_checkpoint": False,
    "use_fp16": False,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
# How a network is used, which its weights do not tell; names as in the original's flags.
USE: dict[str, Any] = {
    "wrapper": None,  # {"KarrasDenoiser": {...}} of consistency_models
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": False,
    "predict_xstart": False,
    "learn_sigma": None,  # None: out_channels == 2 in_channels
    "sigma_data": 0.5,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "distillation": True,
}
ADM = {"num_head_channels": 64}
CONSISTENCY = {"image_size": 64, **ADM}
IMPROVED = {
    "image_size": 64,
    "num_heads": 4,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}
# The published models. What shapes tell is not repeated.
PRESETS: dict[str, dict[str, Any]] = {
    "64x64_diffusion": ADM | {"image_size": 64, "noise_schedule": "cosine", "use_new_attention_order": True, "dropout": 0.1},
    "128x128_diffusion": {"image_size": 128, "num_heads": 4},
    "256x256_diffusion": ADM | {"image_size": 256},
    "256x256_diffusion_uncond": ADM | {"image_size": 256},
    "512x512_diffusion": ADM | {"image_size": 512},
    "lsun": ADM | {"image_size": 256, "dropout": 0.1},
    "imagenet64_uncond_100M_1500K": IMPROVED,
    "imagenet64_cond_270M_250K": IMPROVED,
    "cifar10_uncond_50M_500K": IMPROVED | {"image_size": 32, "dropout": 0.3},
    "edm_imagenet64_ema": CONSISTENCY | {"distillation": False},
    "cd_imagenet64": CONSISTENCY,
    "ct_imagenet64": CONSISTENCY,
    "edm_lsun256": ADM | {"image_size": 256, "distillation": False},
    "cd_lsun256": ADM | {"image_size": 256},
    "ct_lsun256": ADM | {"image_size": 256},
}
SIZES = {  # channel_mult -> image size, guided-diffusion's own table
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
    (1, 2, 2, 2): 32,
}


def read(state: Mapping[str, Any], class_name: str | None, config: dict[str, Any]) -> tuple[UNet, Layout, About]:
    """The network without weights, where they are, and how it is used."""
    class_name = class_name or "UNetModel"
    require(class_name == "UNetModel", f"class_name: {class_name!r} is not read; of OpenAI's networks only UNetModel is")
    config = dict(config)
    name = config.pop("preset", None)
    require(name is None or name in PRESETS, f"config: preset {name!r} is not known; use one of {', '.join(PRESETS)}")
    given = ({"use_new_attention_order": False} | PRESETS[name] if name else {}) | config
    use = options({k: v for k, v in given.items() if k in USE}, USE, "UNetModel")
    arguments = {k: v for k, v in given.items() if k not in USE}
    if "model_channels" not in arguments:
        arguments = infer(state) | arguments
    v = options(arguments, ARGUMENTS, "UNetModel", PRESETS)
    flash = _flat_projection(state) is False
    network = build(_architecture(v))
    order = "flash" if flash or v["use_new_attention_order"] else "legacy"
    if not flash and "use_new_attention_order" not in arguments and _several_heads(network):
        warnings.warn(
            "attention: shapes cannot tell guided-diffusion's legacy order of q, k and v from the new one; legacy is taken. "
            "Check that samples look right; the model's flags say it: from_state_dict(..., use_new_attention_order=True)",
            stacklevel=4,
        )
    return network, _layout(network, v, order), _about(v, use, flash)


def _flat_projection(state: Mapping[str, Any]) -> bool | None:
    """True: q, k, v come from a Conv1d (guided-diffusion); False: a Conv2d (consistency_models); None: no attention."""
    for key, value in state.items():
        if str(key).endswith(".qkv.weight") and isinstance(value, (Tensor, Stored)):
            return len(value.shape) == 3
    return None


def _several_heads(network: UNet) -> bool:
    return any(getattr(m, "heads", 1) > 1 for m in network.modules())


def _architecture(v: Mapping[str, Any]) -> UNetConfig:
    require(v["dims"] == 2, f"config: dims {v['dims']} is not read; only images are")
    require(v["conv_resample"] or v["resblock_updown"], "config: conv_resample False is not read")
    require(v["num_heads_upsample"] in (-1, v["num_heads"]), "config: num_heads_upsample must be num_heads or -1 to be read")
    blocks = v["num_res_blocks"]
    require(isinstance(blocks, int), f"config: num_res_blocks {blocks!r} is not read; one number for all levels is")
    first, model = v["channel_mult"][0], v["model_channels"]
    channels = int(first * model)  # of the first convolution; the time is embedded in model_channels
    require(model % channels == 0, f"config: model_channels {model} is no multiple of the first level's {channels}")
    return UNetConfig(
        resolution=v["image_size"],
        in_channels=v["in_channels"],
        out_channels=v["out_channels"],
        channels=channels,
        multipliers=tuple(m / first if m % first else int(m / first) for m in v["channel_mult"]),
        blocks=blocks,
        attention=tuple(v["image_size"] // int(d) for d in v["attention_resolutions"]),
        head_channels=max(v["num_head_channels"], 0),
        heads=v["num_heads"],
        dropout=v["dropout"],
        eps=1e-5,
        conditioning="scale_shift" if v["use_scale_shift_norm"] else "add",
        resampling="block" if v["resblock_updown"] else "conv",
        frequency_shift=0,
        time_multiplier=model // channels,
        embedding_multiplier=4 * model // channels,
        labels=v["num_classes"] or 0,
    )


def _about(v: Mapping[str, Any], use: dict[str, Any], flash: bool) -> About:
    karras = (use["wrapper"] or {}).get("KarrasDenoiser")
    if flash or karras is not None:
        use |= karras or {}
        kind = "consistency" if use["distillation"] else "edm"
        prediction = Prediction(kind, sigma_data=use["sigma_data"], time_scale=1000.0)
        family = "consistency" if use["distillation"] else "diffusion"
        return About(EDM(use["sigma_min"], use["sigma_max"]), prediction, family)
    law, T = use["noise_schedule"], use["diffusion_steps"]
    require(law in ("linear", "cosine"), f"config: noise_schedule {law!r} is not known; use linear or cosine")
    schedule = DDPM(T, 1e-4 * 1000 / T, 0.02 * 1000 / T, law)
    learned = use["learn_sigma"] if use["learn_sigma"] is not None else v["out_channels"] == 2 * v["in_channels"]
    prediction = Prediction(
        "x0" if use["predict_xstart"] else "eps",
        time_scale=1000 / T if use["rescale_timesteps"] else 1.0,
        learned_variance=bool(learned),
    )
    return About(schedule, prediction)


def _layout(network: UNet, v: Mapping[str, Any], order: str) -> Layout:
    layout = Layout()
    layout.module("time0", "time_embed.0")
    layout.module("time1", "time_embed.2")
    layout.tensor("time0.weight", "time_embed.0.weight", swap_halves)
    layout.module("label", "label_emb")
    layout.module("conv_in", "input_blocks.0.0")
    layout.module("norm_out", "out.0")
    layout.module("conv_out", "out.2")

    def residual(ours: str, theirs: str, attention_at: str) -> None:
        layout.block(ours, theirs, RESIDUAL)
        if n := heads(network, ours):
            layout.block(ours, attention_at, ATTENTION)
            layout.qkv(f"{ours}.attention.qkv", f"{attention_at}.qkv", n, order)

    for i, _, _, index in steps(network.down, 0, 1):
        theirs = f"input_blocks.{i + 1}"
        if index < 0 and not v["resblock_updown"]:
            layout.module(f"down.{i}.conv", f"{theirs}.0.op")
        else:
            residual(f"down.{i}", f"{theirs}.0", f"{theirs}.1")
    residual("middle.0", "middle_block.0", "middle_block.1")
    residual("middle.1", "middle_block.2", "")
    block, within = -1, 0  # a block's last module leads to the next level
    for i, _, _, index in steps(network.up, len(v["channel_mult"]) - 1, -1):
        if index < 0:
            theirs = f"output_blocks.{block}.{within}"
            if v["resblock_updown"]:
                residual(f"up.{i}", theirs, "")
            else:
                layout.module(f"up.{i}.conv", f"{theirs}.conv")
        else:
            block, within = block + 1, 2 if heads(network, f"up.{i}") else 1
            residual(f"up.{i}", f"output_blocks.{block}.0", f"output_blocks.{block}.1")
    return layout


def infer(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that shapes and names tell; image_size only for the multipliers that guided-diffusion knows."""

    def shape(key: str) -> tuple[int, ...]:
        found = shape_of(state, key)
        require(len(found) >= 2, f"state: {key} is missing or no matrix; this is no UNetModel")
        return found

    model = shape("time_embed.0.weight")[-1]
    # The way up tells levels apart, because the block that ends one also doubles the resolution.
    names = "\n".join(map(str, state))
    count = len({m for m in re.findall(r"^output_blocks\.(\d{1,4})\.0\.", names, re.M)})
    ends = sorted(
        int(m) for m in set(re.findall(r"^output_blocks\.(\d{1,4})\.[12]\.(?:conv|in_layers\.0)\.weight$", names, re.M))
    )
    per_level = ends[0] + 1 if ends else count
    require(
        per_level and ends == list(range(per_level - 1, count - 1, per_level)) and count % per_level == 0,
        f"state: {count} output_blocks with resampling after {ends}; only equal numbers of blocks on all levels are read",
    )
    last = range(count - 1, -1, -per_level)  # the last block of each level, first level first
    widths = [shape(f"output_blocks.{i}.0.out_layers.3.weight")[0] for i in last]
    mult = tuple(w / model if w % model else w // model for w in widths)
    blocks_updown = bool(re.search(r"^output_blocks\.\d+\.[12]\.in_layers\.0\.weight$", names, re.M))
    found: dict[str, Any] = {
        "model_channels": model,
        "channel_mult": mult,
        "num_res_blocks": per_level - 1,
        "attention_resolutions": tuple(2**n for n, i in enumerate(last) if f"output_blocks.{i}.1.qkv.weight" in state),
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "num_classes": shape("label_emb.weight")[0] if "label_emb.weight" in state else None,
        "use_scale_shift_norm": shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resblock_updown": blocks_updown,
    }
    if mult in SIZES:
        found["image_size"] = SIZES[mult]
    if _flat_projection(state) is False:
        found["num_head_channels"] = 64  # of every published consistency model
    return found

"""The way back: our network as diffusers' UNet2DModel, names and arguments."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastdiff.checkpoints import diffusers
from fastdiff.checkpoints.layout import require
from fastdiff.denoiser import Prediction
from fastdiff.schedules import DDPM, Schedule
from fastdiff.unet import UNet, UNetConfig

# What UNet2DModel has no argument for must be as in a plain network.
PLAIN = ["attention_up", "group_channels", "project_resampled", "skip_scale", "embedding", "filter", "heads"]
PLAIN += ["input_pyramid", "output_pyramid", "time_multiplier", "label_input", "label_optional", "augment"]


def config_of(c: UNetConfig) -> dict[str, Any]:
    """UNet2DModel's arguments; CheckpointError for what it cannot express."""
    plain = UNetConfig()
    for name in PLAIN:
        value = getattr(c, name)
        require(value == getattr(plain, name), f"network: diffusers' UNet2DModel has no {name} {value!r}")
    here = [(c.resolution >> i) in c.attention for i in range(len(c.levels))]
    narrow = min([w for w, attends in zip(c.levels, here, strict=True) if attends] + c.levels[-1:])
    require(c.levels[0] == c.channels, "network: diffusers' first convolution is as wide as the first level")
    require(c.groups <= min(c.levels), f"network: diffusers has {c.groups} groups at every width, of {min(c.levels)} too")
    require(c.head_channels <= narrow, f"network: diffusers has attention heads of {c.head_channels} at width {narrow} too")
    block = c.resampling == "block"
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if block else ("DownBlock2D", "UpBlock2D")
    return {
        "_class_name": "UNet2DModel",
        "sample_size": c.resolution,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "flip_sin_to_cos": False,
        "freq_shift": c.frequency_shift,
        "time_embedding_dim": c.embedding_width,
        "down_block_types": ["AttnDownBlock2D" if attends else down for attends in here],
        "up_block_types": ["AttnUpBlock2D" if attends else up for attends in reversed(here)],
        "block_out_channels": c.levels,
        "layers_per_block": c.blocks,
        "downsample_padding": 0 if c.resampling == "conv_end" else 1,
        "downsample_type": "resnet" if block else "conv",
        "upsample_type": "resnet" if block else "conv",
        "dropout": c.dropout,
        "attention_head_dim": c.head_channels or None,
        "norm_num_groups": c.groups,
        "attn_norm_num_groups": c.groups if c.attention_middle == "norm" else None,
        "norm_eps": c.eps,
        "resnet_time_scale_shift": "default" if c.conditioning == "add" else "scale_shift",
        "num_class_embeds": c.labels or None,
        "add_attention": c.attention_middle != "none",
    }


def state_of(network: UNet, config: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict under diffusers' names: q, k and v apart, and 1x1 convolutions of attention as matrices."""
    layout = diffusers.names(network, diffusers.DEFAULTS | {k: v for k, v in config.items() if not k.startswith("_")}, {})
    state: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        names = layout.source(key)[0]
        parts = value.chunk(len(names))
        matrix = ".attention.qkv." in key or ".attention.proj." in key
        state |= {n: (p.flatten(1) if matrix and p.dim() > 2 else p).contiguous() for n, p in zip(names, parts, strict=True)}
    return state


def scheduler_of(schedule: Schedule, prediction: Prediction) -> dict[str, Any]:
    """DDPMScheduler's configuration; CheckpointError for what is no discrete DDPM."""
    kinds = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    usual = prediction.trained is None and prediction.time_scale == 1
    require(
        isinstance(schedule, DDPM) and prediction.kind in kinds and usual,
        f"schedule: {type(schedule).__name__} with prediction {prediction.kind!r} has no place in DDPMScheduler",
    )
    assert isinstance(schedule, DDPM)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule.T,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(schedule.law, schedule.law),
        "prediction_type": kinds[prediction.kind],
        "variance_type": "learned_range" if prediction.learned_variance else "fixed_small",
    }


def write(network: UNet, schedule: Schedule, prediction: Prediction, folder: Path) -> None:
    """The folder of a DDPMPipeline: the network, its scheduler, and which they are."""
    config, scheduler = config_of(network.config), scheduler_of(schedule, prediction)
    state = state_of(network, config)
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    for name, value in (("unet/config", config), ("scheduler/scheduler_config", scheduler), ("model_index", index)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2))

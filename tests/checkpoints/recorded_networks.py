"""Recorded networks of other projects."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import fastdiff

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
FAMILIES = {
    "NVlabs/edm": "edm",
    "openai/consistency_models": "openai",
    "openai/guided-diffusion": "openai",
    "yang-song/score_sde_pytorch": "score_sde",
    "huggingface/diffusers": "diffusers",
}


@dataclasses.dataclass
class Recorded:
    weights: dict[str, torch.Tensor]
    io: dict[str, torch.Tensor]
    family: str
    class_name: str
    constructor: dict[str, Any]

    def model(self, **changes) -> fastdiff.Model:
        return fastdiff.from_state_dict(self.weights, self.family, self.class_name, **(self.constructor | changes))


def recorded(case: str) -> Recorded:
    with safe_open(DATA / f"{case}.safetensors", "pt") as file:
        about = {k: json.loads(v) for k, v in file.metadata().items()}
        parts: dict[str, dict] = {"weights": {}, "io": {}}
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
    return Recorded(parts["weights"], parts["io"], FAMILIES[about["peer"]], about["class"], about["constructor"])


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())

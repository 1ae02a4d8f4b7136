"""Foreign checkpoints: one file per family that names its tensors, and the readers that never run what they read."""

from typing import Any

from torch import Tensor

from fastdiff.checkpoints import diffusers, edm, openai, score_sde
from fastdiff.checkpoints.errors import CheckpointError
from fastdiff.checkpoints.layout import About, Convention, build, fill
from fastdiff.unet import UNet

FAMILIES = {"diffusers": diffusers, "edm": edm, "openai": openai, "score_sde": score_sde}

__all__ = ["FAMILIES", "About", "CheckpointError", "Convention", "build", "convert"]


def convert(
    state: dict[str, Tensor], family: str, class_name: str | None, config: dict[str, Any], where: str, own: bool = False
) -> tuple[UNet, About]:
    """The network with its weights, and how it is used; `state` is emptied. See `fastdiff.from_state_dict`."""
    if family not in FAMILIES:
        raise ValueError(f"family: {family!r} is not known; use one of {', '.join(FAMILIES)}")
    network, layout, about = FAMILIES[family].read(state, class_name, config)
    fill(network, layout, state, where, own)
    return network, about

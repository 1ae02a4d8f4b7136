"""Foreign checkpoints: one file per family that names its tensors, and the readers that never run what they read."""

from typing import Any

from fastdiff.checkpoints import diffusers, edm, openai, score_sde
from fastdiff.checkpoints.errors import CheckpointError
from fastdiff.checkpoints.layout import About, Convention, Layout, build, fill
from fastdiff.checkpoints.stored import Weight
from fastdiff.unet import UNet

FAMILIES = {"diffusers": diffusers, "edm": edm, "openai": openai, "score_sde": score_sde}

__all__ = ["FAMILIES", "About", "CheckpointError", "Convention", "Layout", "build", "convert", "fill"]


def convert(
    state: dict[str, Weight], family: str, class_name: str | None, config: dict[str, Any], where: str
) -> tuple[UNet, About]:
    """The network with its weights, and how it is used; `state` is emptied. See `fastdiff.from_state_dict`."""
    if family not in FAMILIES:
        raise ValueError(f"family: {family!r} is not known; use one of {', '.join(FAMILIES)}")
    network, layout, about = FAMILIES[family].read(state, class_name, config)
    fill(network, layout, state, where)
    return network, about

"""compile: a model's network lowered to a flat program with packed weights and everything foldable folded.

`fastdiff.sample` does it by itself where it pays; `fastdiff.compile` does it now and gives a `Compiled` model that can be
saved. What cannot be lowered stays as it is, and the reason is said.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.compile.choose import choose, eight_bits
from fastdiff.compile.choose_attention import choose_attention
from fastdiff.compile.fits import obstacle
from fastdiff.compile.program import Program
from fastdiff.compile.spill import Spill
from fastdiff.model import Model
from fastdiff.request import QUALITIES, check_batch_size, check_quality, make_plan
from fastdiff.unet import UNet

__all__ = ["Compiled", "compile", "program_of"]


@dataclasses.dataclass
class Compiled(Model):
    """A model whose network is a `Program`; `original` holds the weights, for `save` and for `Model.state`.

    A snapshot: train or change the model that was compiled, and compile again. Weights of more than 32 MB are in a nameless
    file that is mapped, packed and original ones (`program.where` says how many and where), so that the memory of the model
    that was compiled is free once nobody holds it.
    """

    original: UNet | None = None
    quality: str = "lossless"

    @property
    def program(self) -> Program:
        assert isinstance(self.network, Program)
        return self.network

    @property
    def plain(self) -> Model:
        """The model that was compiled."""
        assert self.original is not None
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Model)}
        return Model(**(fields | {"network": self.original}))

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def state(self) -> dict[str, Tensor]:
        return self.plain.state

    def hash(self) -> str:
        """That of the model that was compiled."""
        return self.plain.hash()

    def _description(self) -> dict[str, Any]:
        return self.plain._description()

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write weights, packed weights and choices; `fastdiff.load` maps them in another process, in moments.

        dtype: as in `Model.save`; then only the model is written, without its program.
        """
        from fastdiff.compile.store import save

        self.plain.save(path, dtype) if dtype is not None else save(self, path)


def compile(
    model: Model,
    *,
    batch: int = 1,
    nfe: int | None = None,
    quality: str = "lossless",
    size: tuple[int, int] | None = None,
    **options: Any,
) -> Model:
    """The model with its network lowered to the fastest program there is for this machine.

    Args:
        model: one whose network is a `fastdiff.UNet`. Any other is returned as it is, with a warning that says why.
        batch: images per call at which algorithms are compared. Any batch can be computed, on CPUs with the same bits for an
            image.
        nfe: evaluations of a plan whose time embeddings are computed now rather than at the first call; `options` as in
            `fastdiff.sample` (sampler=, times=, ...). Unconditional models alone have such.
        quality: "lossless": float32, error at most 2e-5 of the network's output. "high": bfloat16 products with float32
            sums, error at most twice that of a plain bfloat16 network. "fast": on GPUs of compute capability 8.9 and later
            3x3 convolutions of eight bits (E4M3), with some ten times bfloat16's error; elsewhere what "high" is.
        size: (H, W) of the images; the model's own by default.

    Returns: a `Compiled` model, or `model`. Of a network of more than 32 MB it holds the weights in a nameless file of the
        cache folder (`fastdiff info`) that is gone with them, up to five times the network's size; in memory where less than
        a gigabyte of the disk would be left, with a warning, where the folder is itself memory, or by FASTDIFF_CACHE=off.

    Raises: TypeError, ValueError naming argument, value and remedy.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a fastdiff.Model, got {type(model).__name__}; fastdiff.load(...) gives one")
    check_quality(quality)
    batch = check_batch_size(batch, model.device)
    if isinstance(model, Compiled):
        model = model.plain
    reason = obstacle(model.network)
    if reason is not None:
        warnings.warn(f"fastdiff.compile: the network stays as it is: {reason}", stacklevel=2)
        return model
    assert isinstance(model.network, UNet)
    spill = Spill(model.network)
    network = spill.network(model.network)
    size = size or model.shape[1:] if model.shape else size
    dtype = QUALITIES[quality]
    fast = quality == "fast" and eight_bits(dtype, model.device)
    program = program_of(network, dtype, batch, size, spill=spill, fast=fast)
    if nfe is not None:
        plan = make_plan(model, nfe, **options)
        program.tabulate([float(plan.prediction.coefficients(plan.schedule, t).c_noise) for t in plan.times])
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(Model)}
    return Compiled(**(fields | {"network": program}), original=network, quality=quality)


def program_of(
    network: UNet,
    dtype: torch.dtype,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    choices: Mapping[str, str] | None = None,
    packed: Mapping[str, Tensor] | None = None,
    spill: Spill | None = None,
    fast: bool = False,
) -> Program:
    """The network's program, its algorithms as given or measured; weights that are packed now go where `spill` says.

    fast: with convolutions of eight bits, which must be served here.
    """
    resolution = network.config.resolution
    height, width = size or (resolution, resolution)
    program = Program(network, dtype, (height, width))
    spill = spill or Spill(network)
    choose(program, batch, choices, packed, spill.put, fast)
    choose_attention(program, batch, choices)
    program.where = spill.finish()
    return program

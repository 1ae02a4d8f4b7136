"""diffusers' residual and attention blocks, recognised without importing diffusers.

What a block is called proves nothing about what this version of it computes: before the first block of a kind is replaced,
a small one with random parameters runs with its own forward and with ours, and both have to agree.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.accelerate.derived import cacheable, derived
from fastdiff.accelerate.layers import GroupNorm, as_norm, conv3x3, is_absent, is_norm, is_silu, norm_silu, packs
from fastdiff.accelerate.swap import Fast, plain, swap

AGREEMENT = 1e-5  # of a small block's two forwards in float32, relative to the largest value


class ResnetBlock(Fast, nn.Module):
    """diffusers' ResnetBlock2D: norms, SiLUs and time embedding in one pass, in CPU inference within the convolutions."""

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    nonlinearity: nn.Module
    dropout: nn.Module
    time_emb_proj: nn.Linear | None
    conv_shortcut: nn.Conv2d | None
    upsample: Callable | None
    downsample: Callable | None
    time_embedding_norm: str
    skip_time_act: bool
    output_scale_factor: float

    def forward(self, input_tensor, temb=None, *args, **kwargs):
        if args or kwargs or not self._knows(temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        return self._fused(input_tensor, temb)

    def _fused(self, x: Tensor, temb: Tensor | None) -> Tensor:
        resample = self.downsample if self.upsample is None else self.upsample
        given = self._condition(temb)
        if self._packs(x):
            return self._packed(x, resample, given)
        h = norm_silu(self.norm1, x)
        if resample is not None:
            x, h = resample(x), resample(h)
        h = norm_silu(self.norm2, self.conv1(h), **given)
        h = self.conv2(self.dropout(h))
        return (self._skip(x) + h) / self.output_scale_factor

    def _knows(self, temb) -> bool:
        """Nothing was hooked or exchanged, and temb is of the usual kind."""
        if self.time_emb_proj is None:
            usual = temb is None and self.time_embedding_norm != "scale_shift"
        else:
            usual = temb is not None and self.time_embedding_norm in ("default", "scale_shift")
        return usual and is_norm(self.norm1) and is_norm(self.norm2) and is_silu(self.nonlinearity)

    def _condition(self, temb: Tensor | None) -> dict[str, Any]:
        """The time embedding as norm2 takes it."""
        if self.time_emb_proj is None:
            return {}
        e = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "default":
            return {"add": e}
        scale, shift = e.chunk(2, dim=1)
        return {"scale": scale, "shift": shift}

    def _skip(self, x: Tensor) -> Tensor:
        if self.conv_shortcut is None:
            return x
        # diffusers does so too: strides that vary from step to step slow DistributedDataParallel down
        return self.conv_shortcut(x.contiguous() if self.training else x)

    def _packs(self, x: Tensor) -> bool:
        convolutions = self.conv1, self.conv2
        return all(packs(c, x) and plain(c) for c in convolutions) and is_absent(self.dropout)

    def _packed(self, x: Tensor, resample, given: dict[str, Any]) -> Tensor:
        add = given.pop("add", None)
        rows, x = x.is_contiguous(), x.contiguous(memory_format=torch.channels_last)  # the kernels' layout
        if resample is None:
            h, first = x, as_norm(self.norm1)
        else:
            x, h, first = resample(x), resample(norm_silu(self.norm1, x)), None
        h, stats = conv3x3(self.conv1, h, add, norm=first, stats_groups=self.norm2.num_groups)
        second = as_norm(self.norm2, stats=stats, **given)
        y, _ = conv3x3(self.conv2, h, norm=second, residual=self._skip(x), out_scale=1 / self.output_scale_factor)
        return y.contiguous() if rows else y


class Attention(Fast, nn.Module):
    """diffusers' Attention over the pixels of an image with its norm and residual, by `ops.group_norm_attention`.

    In inference; training keeps the library's attention, whose backward need not compute q, k and v again.
    """

    group_norm: nn.GroupNorm
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList
    processor: object
    heads: int
    scale: float
    rescale_output_factor: float

    PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        alone = encoder_hidden_states is None and attention_mask is None and not set(kwargs) - {"temb"}
        if alone and self._knows(hidden_states):
            return self._fused(hidden_states)
        return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def _knows(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or x.dim() != 4 or torch.is_autocast_enabled(x.device.type):
            return False
        layers = (self.to_q, self.to_k, self.to_v, self.to_out[0])
        usual = all(isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward and plain(m) for m in layers)
        processor = type(self.processor).__name__ in self.PROCESSORS
        return usual and processor and is_norm(self.group_norm) and is_absent(self.to_out[1])

    def _fused(self, x: Tensor) -> Tensor:
        q, k, v, norm = self.to_q, self.to_k, self.to_v, self.group_norm
        out: Any = self.to_out[0]
        joined, biases = (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias)
        bias = None if q.bias is None else torch.cat(biases)
        keep = not torch.compiler.is_compiling() and cacheable(*joined)
        weight = derived(self, joined, _join) if keep else _join(*joined)
        scale = self.scale if type(self.processor).__name__ == "AttnProcessor" else None
        return ops.group_norm_attention(
            x, norm.weight, norm.bias, norm.num_groups, weight, bias, out.weight, out.bias, self.heads, norm.eps,
            scale=scale, out_scale=1 / self.rescale_output_factor,
        )  # fmt: skip


def _join(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def _is_diffusers(module: nn.Module, name: str) -> bool:
    forward = type(module).forward
    where, what = getattr(forward, "__module__", None) or "", getattr(forward, "__qualname__", "")
    return where.startswith("diffusers.") and what == f"{name}.forward"


def _own_class(module) -> Any:
    return module.original if isinstance(module, Fast) else type(module)


def is_resnet(module: nn.Module) -> bool:
    return _is_diffusers(module, "ResnetBlock2D")


def is_attention(module: nn.Module) -> bool:
    """An Attention with a norm of its own: the block over an image's pixels."""
    return _is_diffusers(module, "Attention") and getattr(module, "group_norm", None) is not None


def why_not_resnet(block) -> str:
    """ "" or why the block keeps its own forward."""
    if not is_silu(block.nonlinearity):
        hooked = isinstance(block.nonlinearity, nn.SiLU)
        return "its SiLU has hooks" if hooked else f"its activation is {type(block.nonlinearity).__name__}, no SiLU"
    if not (is_norm(block.norm1) and is_norm(block.norm2)):
        return "its norms were left"
    if block.time_emb_proj is None and block.time_embedding_norm == "scale_shift":
        return "it has scale and shift but no time embedding"
    flags = {
        "time_embedding_norm": block.time_embedding_norm,
        "skip_time_act": block.skip_time_act,
        "temb_channels": None if block.time_emb_proj is None else 6,
        "up": block.upsample is not None,
        "down": block.downsample is not None,
        "output_scale_factor": block.output_scale_factor,
    }
    own = _own_class(block)
    return _rehearsed_resnet(own, own.forward, tuple(flags.items()))


def why_not_attention(block) -> str:
    """ "" or why the block keeps its own forward."""
    reasons = {
        "it has a spatial norm": block.spatial_norm is not None,
        "it normalises q or k": getattr(block, "norm_q", None) is not None or getattr(block, "norm_k", None) is not None,
        "it attends to other inputs too": block.is_cross_attention or block.added_kv_proj_dim is not None,
        "it has no residual connection": not block.residual_connection,
        "it is causal": getattr(block, "is_causal", False),
        "it has fewer heads of k and v than of q": block.inner_kv_dim != block.inner_dim,
        "it has no projection behind it": block.to_out is None,
        f"its processor is {type(block.processor).__name__}": type(block.processor).__name__ not in Attention.PROCESSORS,
        "its norm was left": not is_norm(block.group_norm),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    flags = {"processor": type(block.processor), "rescale_output_factor": block.rescale_output_factor}
    own = _own_class(block)
    return _rehearsed_attention(own, own.forward, tuple(flags.items()))


@contextlib.contextmanager
def _apart():
    """Small random blocks touch neither the user's random numbers nor are they touched by the user's modes."""
    modes = torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.no_grad()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), modes[0], modes[1], modes[2]:
        yield


def _agree(block: Any, kind: type[Fast], norms: tuple[str, ...], *inputs) -> str:
    """ "" if block computes the same with kind's forward; block is changed."""
    for parameter in block.parameters():
        parameter.normal_()
    block.float().eval()
    expected = block(*inputs)
    for name in norms:
        swap(getattr(block, name), GroupNorm)
    swap(block, kind)
    if float((block._fused(*inputs) - expected).abs().max()) <= AGREEMENT * float(expected.abs().max()):
        return ""
    return f"this version's {type(block).__name__} computes something else than is known here"


@functools.cache
def _rehearsed_resnet(cls: Any, _forward: Callable, flags: tuple) -> str:
    options = dict(flags)
    with _apart():
        try:
            block = cls(in_channels=4, out_channels=8, groups=2, **options)
        except TypeError:
            return f"this version's {cls.__name__} is built in another way than is known here"
        temb = None if options["temb_channels"] is None else torch.randn(2, 6, dtype=torch.float32)
        return _agree(block, ResnetBlock, ("norm1", "norm2"), torch.randn(2, 4, 8, 8, dtype=torch.float32), temb)


@functools.cache
def _rehearsed_attention(cls: Any, _forward: Callable, flags: tuple) -> str:
    options = dict(flags)
    with _apart():
        try:
            block = cls(
                8, heads=2, dim_head=4, bias=True, norm_num_groups=2, residual_connection=True,
                rescale_output_factor=options["rescale_output_factor"], processor=options["processor"](),
            )  # fmt: skip
        except TypeError:
            return f"this version's {cls.__name__} is built in another way than is known here"
        return _agree(block, Attention, ("group_norm",), torch.randn(2, 8, 4, 4, dtype=torch.float32))

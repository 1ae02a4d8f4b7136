"""From the original's names and axes to ours: one table of names per network, and the few changes of layout."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff.checkpoints.errors import CheckpointError
from fastdiff.checkpoints.stored import Stored, Weight
from fastdiff.denoiser import Prediction
from fastdiff.nn import Attention
from fastdiff.schedules import Schedule
from fastdiff.unet import UNet, UNetConfig

SHOWN = 8  # names listed per group of an error
Change = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Convention:
    """How the original calls its network, where that is not F(x, c_noise) for images in [-1, 1].

    log_level: it takes the noise level, and its embedding the logarithm. divided: its output is F / level.
    unit_range: its images lie in [0, 1], which its network maps to [-1, 1]. unit_images: they lie in [0, 1] and are not
    mapped, so that samplers work in [0, 1] as well, and only the images they make are mapped to [-1, 1].
    """

    log_level: bool = False
    divided: bool = False
    unit_range: bool = False
    unit_images: bool = False

    def describe(self) -> dict[str, bool]:
        """What is not as usual."""
        return {name: True for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass
class About:
    """What a checkpoint says beside its weights: the fields of a `Model`."""

    schedule: Schedule
    prediction: Prediction
    family: str = "diffusion"
    convention: Convention = dataclasses.field(default_factory=Convention)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


class Layout:
    """Where each of our tensors is in the original's state dict."""

    def __init__(self, ignored: str = r"(?!)"):
        self.modules: dict[str, str] = {}
        self.tensors: dict[str, tuple[tuple[str, ...], Change]] = {}
        self.ignored = re.compile(ignored)  # keys that hold no weights

    def module(self, ours: str, theirs: str) -> None:
        """Every tensor of module `ours` is the one of the same name in `theirs`."""
        self.modules[ours] = theirs

    def block(self, ours: str, theirs: str, table: Mapping[str, str]) -> None:
        """A block's modules, after a table {theirs: ours}."""
        for their, our in table.items():
            self.module(f"{ours}.{our}", f"{theirs}.{their}")

    def tensor(self, ours: str, theirs: str | tuple[str, ...], change: Change) -> None:
        """Tensor `ours` is change(*tensors of the names `theirs`)."""
        self.tensors[ours] = ((theirs,) if isinstance(theirs, str) else theirs, change)

    def qkv(self, ours: str, theirs: str, heads: int, order: str) -> None:
        """The projection to q, k and v in the original's order of channels, see `QKV`."""
        for leaf in ("weight", "bias"):
            self.tensor(f"{ours}.{leaf}", f"{theirs}.{leaf}", lambda w: reorder_qkv(w, heads, order))

    def source(self, ours: str) -> tuple[tuple[str, ...], Change]:
        if ours in self.tensors:
            return self.tensors[ours]
        module, leaf = ours.rpartition(".")[::2]
        return (f"{self.modules.get(module, module)}.{leaf}",), lambda w: w


# Axes of the 3C output channels of a q, k, v projection, slowest first; ours is "flash".
QKV = {
    "flash": ("qkv", "head", "channel"),  # consistency_models, guided-diffusion's new order
    "legacy": ("head", "qkv", "channel"),  # improved-diffusion, guided-diffusion
    "edm": ("head", "channel", "qkv"),
}


def reorder_qkv(w: Tensor, heads: int, order: str) -> Tensor:
    """[3C, ...] in the named order of channels -> [3C, ...] with q, k and v one after the other, heads within."""
    axes = QKV[order]
    if axes == QKV["flash"] or w.shape[0] % (3 * heads):
        return w
    size = {"qkv": 3, "head": heads, "channel": w.shape[0] // (3 * heads)}
    split = w.reshape([size[a] for a in axes] + list(w.shape[1:]))
    rest = range(3, split.dim())
    return split.permute(*(axes.index(a) for a in QKV["flash"]), *rest).reshape(w.shape)


def swap_halves(w: Tensor) -> Tensor:
    """Columns for (cosines, sines) -> columns for (sines, cosines)."""
    return w.roll(w.shape[1] // 2, 1)


def steps(modules: nn.ModuleList, level: int, sign: int) -> Iterator[tuple[int, nn.Module, int, int]]:
    """(position, module, its level, its index within the level) of one half of a UNet; resamplers open a level, index -1."""
    index = 0
    for i, module in enumerate(modules):
        if module.change:
            level, index = level + sign, 0
            yield i, module, level, -1
        else:
            yield i, module, level, index
            index += 1


def heads(network: UNet, block: str) -> int:
    """Attention heads of a residual block, 0 where it has no attention."""
    attention = getattr(network.get_submodule(block), "attention", None)
    return attention.heads if isinstance(attention, Attention) else 0


class _WithoutWeights(TorchFunctionMode):
    """On the meta device: weights are not drawn, and what no checkpoint holds, frequencies and filters, is computed as ever.

    Arithmetic on that device would also import torch's compiler, 1.4 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("kaiming_uniform_", "uniform_", "normal_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs | {"device": "cpu"} if name in ("arange", "tensor") else kwargs))


def build(config: UNetConfig) -> UNet:
    """The network without memory for its weights."""
    with torch.device("meta"), _WithoutWeights():
        return UNet(config)


def fill(network: nn.Module, layout: Layout, state: dict[str, Any], where: str) -> None:
    """Move the weights of `state` into `network`, as float32 and in its own strides; `state` is emptied on the way.

    Stored tensors are read one at a time, so that the memory needed is the network's. Tensors stay the caller's.

    Raises: CheckpointError that names what is missing, unexpected, of another shape or not finite.
    """
    wanted = network.state_dict()
    sources = {key: layout.source(key) for key in wanted}
    uses = Counter(name for names, _ in sources.values() for name in names)
    problems: dict[str, list[str]] = {"missing": [n for n in uses if not isinstance(state.get(n), (Tensor, Stored))]}
    problems["unexpected"] = [k for k in state if k not in uses and not layout.ignored.search(str(k))]
    if any(problems.values()):
        _raise(problems, where)
    problems = {"of another shape": [], "not finite": []}
    weights = {}
    for key, blank in wanted.items():
        shape, (names, change) = blank.shape, sources[key]
        try:
            value = _normal(change(*(_float32(state[n]) for n in names)), shape)
        except RuntimeError:  # a change of layout that its sources' shapes do not allow
            value = torch.empty(0)
        if value.shape != shape:
            shapes = " with ".join(str(list(state[n].shape)) for n in names)
            problems["of another shape"].append(f"{names[0]} {shapes} where {list(shape)} belongs")
        elif not value.sum().isfinite() and not torch.isfinite(value).all():  # the sum alone may overflow
            bad = int((~torch.isfinite(value)).sum())
            problems["not finite"].append(f"{names[0]} ({bad} of {value.numel()} values)")
        else:
            weights[key] = _own(value, state[names[0]], blank.stride())
        uses.subtract(names)
        for name in names:
            if not uses[name]:
                del state[name]
    _raise(problems, where)
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)


def _float32(value: Weight) -> Tensor:
    value = value.read() if isinstance(value, Stored) else value.detach()
    return value.float() if value.is_floating_point() else value


def _own(value: Tensor, source: Weight, stride: tuple[int, ...]) -> Tensor:
    """The value with these strides, in memory that is not the source's."""
    shared = isinstance(source, Tensor) and value.data_ptr() == source.data_ptr()
    if not shared and value.stride() == stride:
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)


def _normal(value: Tensor, shape: torch.Size) -> Tensor:
    """The value in `shape` where they differ in trailing ones only: 1x1 convolutions stored as matrices."""
    longer, shorter = sorted((value.shape, shape), key=len, reverse=True)
    same = list(longer) == [*shorter, *[1] * (len(longer) - len(shorter))]
    return value.reshape(shape) if same and math.prod(shape) == value.numel() else value


def _raise(problems: dict[str, list[str]], where: str) -> None:
    groups = []
    for kind, names in problems.items():
        names = list(dict.fromkeys(map(str, names)))
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            groups.append(f"{len(names)} {kind}: {', '.join(n[:200] for n in names[:SHOWN])}{more}")
    if groups:
        raise CheckpointError(f"{where} do not fit the network: {'; '.join(groups)}")


def shape_of(state: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The shape of a tensor of the state dict, () where there is none."""
    value = state.get(key)
    return tuple(value.shape) if isinstance(value, (Tensor, Stored)) else ()


def require(condition: Any, message: str) -> None:
    """Refuse what the network cannot express."""
    if not condition:
        raise CheckpointError(message)


def options(
    config: Mapping[str, Any], defaults: Mapping[str, Any], name: str, presets: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`config` over `defaults`; unknown options are refused by name."""
    unknown = sorted(set(config) - set(defaults))
    require(not unknown, f"config: {name} has no option {', '.join(unknown)}; it has {', '.join(sorted(defaults))}")
    values = {**defaults, **config}
    lacking = [k for k, v in values.items() if v is REQUIRED]
    remedy = "give the arguments the network was built with"
    if presets:
        remedy += f", or a preset, one of {', '.join(presets)}"
    require(not lacking, f"config: {name} needs {', '.join(lacking)}; {remedy}")
    return values


REQUIRED: Any = object()

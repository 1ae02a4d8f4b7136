"""What `sample` runs a model's network by: its program, torch.compile's, or the network itself; made once and kept."""

import copy
import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.compile import Compiled, program_of
from fastdiff.compile.choose import EIGHT_BITS, WIDE, choose, eight_bits, layers
from fastdiff.compile.fits import REFERENCE, Fingerprint, obstacle, say_once
from fastdiff.compile.graph import CudaGraphs, Graphs
from fastdiff.compile.measured import choices
from fastdiff.compile.program import Program, is_light
from fastdiff.model import Model
from fastdiff.plan import execute
from fastdiff.unet import UNet

BATCH = 8  # at which algorithms are compared, whatever the call's: its images shall not decide what computes them
KEPT = 4  # programs, and sets of graphs, per model
# What decides whether a program pays, never what is computed; on Zen 4, networks of 0.2 to 219 GFLOP.
OPERATIONS_PER_SECOND = 8e10  # of the network as it is on one core, about
SAVED = 0.6  # of that time, by a program
WORTH = 0.5  # seconds; for less, other rounding than in the calls before is not worth it
SECONDS = 0.5  # to measure, where no layer size is known, and
TRIALS = 0.6  # of the time of BATCH images
SECONDS_PER_WEIGHT = 2.5e-8  # to pack
# A light network's program is made at the first call, by algorithms that are not measured: that takes some 20 ms.
ONLY = "eight bits are for programs on NVIDIA GPUs of compute capability 8.9 and later, for 64 channels at 16x16 and more"


@dataclasses.dataclass
class Engine:
    """What computes the network, and why it is that: `name` is "fast", "inductor" or "network"."""

    call: Callable[..., Tensor]
    name: str
    why: str = ""
    execute: Callable[..., Tensor] = execute

    @property
    def captured(self) -> bool:
        """Whether the loop is replayed, without a call of the network from Python."""
        return self.execute is not execute

    def describe(self) -> str:
        owner = getattr(self.execute, "__self__", None)
        why = "; ".join(filter(None, (owner.describe() if isinstance(owner, Graphs) else "", self.why)))
        return f"{self.name}: {why}" if why else self.name


class Kept:
    """The programs made for a model, at most `KEPT`, the least recently used dropped; copies and pickles hold none."""

    def __init__(self):
        self.made: OrderedDict[Any, tuple[Any, Fingerprint]] = OrderedDict()
        self.lock = threading.RLock()
        self.size: tuple[int, set[str]] | None = None  # operations of one evaluation of one image, sizes of its layers
        self.evaluations = 0  # of images, by the network itself, in all calls: what a program would have saved counts

    def __deepcopy__(self, memo) -> "Kept":
        return Kept()

    def __reduce__(self):
        return Kept, ()

    def find(self, key, network) -> Any:
        with self.lock:
            call, fingerprint = self.made.get(key, (None, None))
            if fingerprint is None or not fingerprint.holds(network):
                self.made.pop(key, None)
                return None
            self.made.move_to_end(key)
            return call

    def get(self, key, network, make: Callable[[], Any]) -> Any:
        """The one that is kept, or a new one; of threads that ask at once one makes it."""
        with self.lock:
            call = self.find(key, network)
            if call is None:
                self.made[key] = call, _ = make(), Fingerprint(network)
                while len(self.made) > KEPT:
                    self.made.popitem(last=False)
            return call


def kept(model: Model) -> Kept:
    return vars(model).setdefault("_kept", Kept())


def engine(model: Model, network: Any, dtype: torch.dtype, compile: str, evaluations: int, quality: str = "") -> Engine:
    """What computes `network`, the model's on its device: as `compile` says, or where that is "auto" what pays.

    evaluations: images times network calls for each. quality: "fast" asks for convolutions of eight bits, which programs
    alone have; where there are none that is said.
    """
    fast = quality == "fast" and type(network) is UNet and eight_bits(dtype, _device(network))
    found = _engine(model, network, dtype, compile, evaluations, fast)
    asked = model.quality if isinstance(model, Compiled) else quality
    if asked != "fast" or (isinstance(found.call, Program) and EIGHT_BITS in found.call.algorithms.values()):
        return found
    return dataclasses.replace(found, why="; ".join(filter(None, (found.why, f"quality 'fast' is 'high' here: {ONLY}"))))


def _engine(model: Model, network: Any, dtype: torch.dtype, compile: str, evaluations: int, fast: bool) -> Engine:
    if isinstance(model, Compiled):
        return _captured(model, model.original, model.device, network)
    if compile == "off":
        return Engine(network, "network", "compile='off'")
    if compile == "inductor":
        return _inductor(model, network, dtype)
    reason = obstacle(network)
    if reason is None and compile == "auto" and network is not model.network:
        reason = "the model is on another device or in another type; load it there, and its program is kept"
    if reason is None and dtype not in (torch.float32, torch.bfloat16):
        reason = f"programs compute in float32 or bfloat16, not in {dtype}"
    if reason is not None:
        if reason.startswith(REFERENCE):
            say_once(f"sample: no program can be made, and the network is slow: {reason}; `fastdiff info` shows each op")
        return Engine(network, "network", reason)
    where = _device(network)
    key, store = ("fast", str(where), EIGHT_BITS if fast else dtype), kept(model)
    program = store.find(key, network)
    if program is None:
        # of a light network it costs so little that the first image is to have it, and with it the bits of all later ones
        light = dtype == torch.float32 and is_light(network)
        if compile == "auto" and not light and not fast:
            reason = _too_little(model, network, where, dtype, evaluations)
            if reason:
                return Engine(network, "network", reason)
        size = model.shape[1:] if model.shape else None
        make = _unmeasured if light else functools.partial(program_of, fast=fast)
        program = store.get(key, network, lambda: make(network, dtype, BATCH, size))
    return _captured(model, network, where, program)


def _unmeasured(network: UNet, dtype: torch.dtype, batch: int, size: tuple[int, ...] | None) -> Program:
    """`program_of` by algorithms that follow from the layers' shapes: the same on every day and in every process.

    Within 10 % of what measuring finds. "winograd4_lean" is packed in moments, the other takes that for narrow layers too.
    """
    height, width = size or (network.config.resolution, network.config.resolution)
    program = Program(network, dtype, (height, width))
    wide = {step.name: step.weight.shape[0] >= WIDE for step in program.convolutions}
    choose(program, batch, {name: "winograd4_lean" if wide[name] else "winograd4" for name in wide})
    return program


def _captured(model: Model, network, where: torch.device, program: Callable[..., Tensor]) -> Engine:
    """The program, on a GPU with graphs of it."""
    if where.type != "cuda":
        return Engine(program, "fast", program.where if isinstance(program, Program) else "")
    graphs = kept(model).get(("graphs", id(program)), network, lambda: Graphs(CudaGraphs(where)))
    return Engine(program, "fast", execute=graphs.execute)


def _device(network) -> torch.device:
    return next(network.parameters()).device


def _too_little(model: Model, network, where: torch.device, dtype: torch.dtype, evaluations: int) -> str:
    """Why a program does not pay for so many evaluations and those before; empty where it does.

    So a model that is sampled again and again gets one when it would have been worth it, and at most twice the least
    possible time is taken. Layer sizes that were measured before, in this process or another, cost packing alone.
    """
    if where.type != "cpu":
        return "programs on GPUs are not measured yet; compile='fast' makes one"
    store = kept(model)
    store.evaluations += evaluations
    store.size = operations, sizes = store.size or _size(network)
    speed = OPERATIONS_PER_SECOND * torch.get_num_threads() * (2 if dtype == torch.bfloat16 else 1)
    saved = SAVED * store.evaluations * operations / speed
    known = choices(dtype, BATCH)
    unknown = sum(known.find(layer) is None for layer in sizes) / len(sizes)
    cost = WORTH + unknown * (SECONDS + TRIALS * BATCH * operations / speed)
    cost += SECONDS_PER_WEIGHT * sum(p.numel() for p in network.parameters())
    return "" if saved > cost else f"compiling takes some {cost:.1f} s and would save {saved:.1f} s; compile='fast' does it"


def _size(network: UNet) -> tuple[int, set[str]]:
    """Operations of one evaluation of one image, and the sizes of its convolutions; no weight is read."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    shell = copy.deepcopy(network, {key: nn.Parameter(t.detach().to("meta"), False) for key, t in tensors.items()})
    program = Program(shell, torch.float32, (network.config.resolution, network.config.resolution))
    return program.operations, layers(program)


def _inductor(model: Model, network: Callable[..., Tensor], dtype: torch.dtype) -> Engine:
    """torch.compile of the network; on CPUs its weights are frozen, without which bfloat16 is slower than uncompiled."""

    def make() -> Callable[..., Tensor]:
        compiled = torch.compile(network, fullgraph=True)
        if not isinstance(network, torch.nn.Module) or _device(network).type != "cpu":
            return compiled

        def frozen(*args: Tensor) -> Tensor:
            from torch._inductor import config

            with config.patch(freezing=True):
                return compiled(*args)

        return frozen

    if not isinstance(network, torch.nn.Module):
        return Engine(make(), "inductor")
    return Engine(kept(model).get(("inductor", str(_device(network)), dtype), network, make), "inductor")

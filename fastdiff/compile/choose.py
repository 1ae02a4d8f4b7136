"""Which algorithm computes each 3x3 convolution: measured once for each shape, then fixed in the program.

Never by the batch of a call: an image is to have the same bits in every batch. Two compilations may choose differently where
two algorithms are about as fast, and then differ by rounding; a saved program keeps its choices.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.compile.library import LibraryConvolution
from fastdiff.compile.program import LIBRARY, Program
from fastdiff.compile.steps import Conv3x3, Values

ROUNDS = 5
CACHE = 2**26  # bytes, more than a processor's last cache
MARGIN = 0.95  # a candidate must take less than this of the time of the one before it

# dtype -> algorithms beside the library's, in the order of preference at equal speed. Each keeps its class of error: float32
# 1e-6 a layer; bfloat16 at most twice plain bfloat16's.
CANDIDATES = {torch.float32: ("winograd4_lean", "winograd4"), torch.bfloat16: ("winograd2",)}


def candidates(step: Conv3x3, dtype: torch.dtype) -> list[str]:
    """The algorithms that can compute the step here, the library's first."""
    known = ops.conv3x3_algorithms(dtype, step.weight.device)
    return [LIBRARY, *(name for name in CANDIDATES.get(dtype, ()) if name in known)]


def bind(step: Conv3x3, algorithm: str, program: Program, packed: Tensor | None = None) -> None:
    """Prepare the step for the algorithm; `packed` are its weights where they were packed before."""
    weight = step.weight
    step.algorithm, step.packed, step.library = algorithm, None, None
    if algorithm == LIBRARY:
        step.library = LibraryConvolution(weight.to(program.dtype), step.bias, program.sizes[step.name])
    else:
        wanted = ops.conv3x3_pack(weight.to("meta"), algorithm)
        if packed is not None and (packed.shape, packed.dtype) != (wanted.shape, wanted.dtype):
            got = f"{packed.dtype} {tuple(packed.shape)}"
            raise ValueError(f"packed weights of {step.name}: {got}, not {wanted.dtype} {tuple(wanted.shape)}")
        step.packed = ops.conv3x3_pack(weight, algorithm) if packed is None else packed
    # Of the weight only the shape is read from here on.
    step.weight = weight.new_zeros(()).to(program.dtype).expand(weight.shape)


@torch.inference_mode()
def choose(
    program: Program,
    batch: int = 1,
    given: Mapping[str, str] | None = None,
    packed: Mapping[str, Tensor] | None = None,
) -> None:
    """Bind every convolution, to `given`'s algorithms with `packed`'s weights, or to the fastest at `batch` images here."""
    fastest: dict[tuple, str] = {}
    for step in program.convolutions:
        names = candidates(step, program.dtype)
        if given is not None and given.get(step.name) in names:
            chosen = given[step.name]
        elif len(names) == 1:
            chosen = names[0]
        else:
            key = _key(step, program)
            fastest[key] = chosen = fastest.get(key) or _measure(step, program, names, batch)
        kept = packed if packed and given and chosen == given.get(step.name) else {}
        bind(step, chosen, program, kept.get(step.name))


def _key(step: Conv3x3, program: Program) -> tuple:
    """Steps of one key take about the same time."""
    return *step.weight.shape[:2], *program.sizes[step.name]


def _measure(step: Conv3x3, program: Program, names: list[str], batch: int) -> str:
    best, least, elsewhere = names[0], float("inf"), torch.ones(CACHE // 4)
    for name in names:
        v, run = _trial(step, program, name, batch)
        seconds = min(_seconds(v, run, elsewhere) for _ in range(ROUNDS))
        if seconds < MARGIN * least:
            best, least = name, seconds
    return best


def _trial(step: Conv3x3, program: Program, name: str, batch: int) -> tuple[Values, Callable[[], None]]:
    """The step on noise. After a library's convolution a norm takes its statistics itself; after others it has them."""
    h, w = program.sizes[step.name]
    outputs, inputs = step.weight.shape[:2]
    step, generator = dataclasses.replace(step), torch.Generator().manual_seed(0)  # not the caller's random state
    bind(step, name, program)

    def noise(channels: int) -> Tensor:
        return torch.randn(batch, h, w, channels, generator=generator).permute(0, 3, 1, 2).to(program.dtype)

    v: Values = [None] * program.values
    v[step.x] = noise(inputs)
    if step.residual is not None:
        v[step.residual] = noise(outputs)
    if step.norm is not None and step.norm.stats is not None and name != LIBRARY:
        v[step.norm.stats] = torch.tensor([0.0, 1.0]).expand(batch, step.norm.groups, 2).contiguous()
    c = [torch.zeros(batch, width) for width in program.conditions.widths]
    return v, lambda: step.run(v, c)


def _seconds(v: Values, run: Callable[[], None], elsewhere: Tensor) -> float:
    """One run as in the network: what it reads is in the cache, its weights are not."""
    given = [t for t in v if t is not None]
    elsewhere.sum()
    for t in given:
        t.sum()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

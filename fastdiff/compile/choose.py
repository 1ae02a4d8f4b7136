"""Which algorithm computes each 3x3 convolution: measured once for each shape, then fixed in the program.

Never by the batch of a call: an image is to have the same bits in every batch. Choices are kept (`measured`), so that later
programs on the same machine agree with the first; where they are not, two compilations may choose differently between
algorithms that are about as fast, and then differ by rounding. A saved program keeps its choices.

Eight bits are never measured against others, whose errors are smaller: `quality="fast"` alone asks for them, by a rule.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.compile.library import LibraryConvolution
from fastdiff.compile.measured import choices
from fastdiff.compile.program import LIBRARY, Program
from fastdiff.compile.steps import Conv3x3, Values

ROUNDS = 4  # runs of a trial at most
SECONDS = 0.03  # after which two runs of a trial are enough
CACHE = 2**25  # bytes that are read between two runs, about a processor's last cache
MARGIN = 0.95  # a candidate must take less than this of the time of those before it,
HEAVY, LARGER = 0.9, 4 / 3  # and less than this where its weights take more than so many times their memory

# dtype -> algorithms beside the library's, in the order of preference at equal speed: the one with fewer weights first. Each
# keeps its class of error: float32 2e-6 a layer; bfloat16 at most twice plain bfloat16's.
CANDIDATES = {
    torch.float32: ("winograd4_lean", "winograd6", "winograd4"),
    torch.bfloat16: ("winograd2", "winograd4_int16"),
}

WIDE = 64  # output channels, below which "winograd4_lean" has too few tasks for several threads

EIGHT_BITS = "fp8"
SIDE, CHANNELS = 16, 64  # least of a layer whose products are expected to outweigh the rest of it; not measured


def eight_bits(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are convolutions of eight bits for programs of this type here: quality="fast" is more than "high"."""
    return EIGHT_BITS in ops.conv3x3_algorithms(dtype, device)


def takes_eight_bits(step: Conv3x3, program: Program) -> bool:
    """Whether quality="fast" rounds this layer's operands to eight bits.

    A norm is in front, which tells the scale without data; the first and last convolution, which make or meet pixels, and
    all of 1x1 stay as they are.
    """
    if step.norm is None or step.name in ("conv_in", "conv_out") or min(program.sizes[step.name]) < SIDE:
        return False
    return all(channels >= CHANNELS and channels % 16 == 0 for channels in step.weight.shape[:2])  # 16: wide accesses


def candidates(step: Conv3x3, dtype: torch.dtype) -> list[str]:
    """The algorithms that can compute the step here, the library's first."""
    known = ops.conv3x3_algorithms(dtype, step.weight.device)
    return [LIBRARY, *(name for name in CANDIDATES.get(dtype, ()) if name in known)]


def worth_measuring(step: Conv3x3, dtype: torch.dtype, size: tuple[int, int]) -> list[str]:
    """The candidates without those that cannot win by enough to pay for their memory.

    With 32 registers "winograd4_lean" is within 3 % of "winograd4" on wide layers, at a quarter of the weights.
    "winograd6" multiplies less than it from sides of SIDE on.
    """
    names = candidates(step, dtype)
    lean = "winograd4_lean" in names and "avx512" in ops.native() and step.weight.shape[0] >= WIDE
    losing = {"winograd4"} if lean else set()
    losing |= {"winograd6"} if min(size) < SIDE else set()
    return [name for name in names if name not in losing]


def bind(
    step: Conv3x3,
    algorithm: str,
    program: Program,
    packed: Tensor | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Prepare the step for the algorithm; `packed` are its weights where they were packed before, `keep` says where else."""
    weight = step.weight
    step.algorithm, step.packed, step.library = algorithm, None, None
    if algorithm == LIBRARY:
        step.library = LibraryConvolution(weight.to(program.dtype), step.bias, program.sizes[step.name])
    else:
        wanted = ops.conv3x3_pack(weight.to("meta"), algorithm)
        if packed is not None and (packed.shape, packed.dtype) != (wanted.shape, wanted.dtype):
            got = f"{packed.dtype} {tuple(packed.shape)}"
            raise ValueError(f"packed weights of {step.name}: {got}, not {wanted.dtype} {tuple(wanted.shape)}")
        if packed is None:
            n = step.norm
            norm = ops.Norm(n.weight, n.bias, n.groups) if algorithm == EIGHT_BITS and n is not None else None
            packed = ops.conv3x3_pack(weight, algorithm, norm=norm)
            packed = packed if keep is None else keep(packed)
        step.packed = packed
    # Of the weight only the shape is read from here on.
    step.weight = weight.new_zeros(()).to(program.dtype).expand(weight.shape)


@torch.inference_mode()
def choose(
    program: Program,
    batch: int = 1,
    given: Mapping[str, str] | None = None,
    packed: Mapping[str, Tensor] | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
    fast: bool = False,
) -> None:
    """Bind every convolution, to `given`'s algorithms with `packed`'s weights, or to the fastest at `batch` images here.

    keep: where weights that are packed now go. fast: eight bits where a layer takes them, whatever is given.
    """
    known, elsewhere = choices(program.dtype, batch, program.device), None
    for step in program.convolutions:
        names = candidates(step, program.dtype)
        if fast and takes_eight_bits(step, program):
            chosen = EIGHT_BITS
        elif given is not None and given.get(step.name) in names:
            chosen = given[step.name]
        elif len(names) == 1:
            chosen = names[0]
        else:
            layer = _layer(step, program)
            chosen = known.find(layer) or ""
            if chosen not in names:
                elsewhere = torch.ones(CACHE // 4) if elsewhere is None else elsewhere
                names = worth_measuring(step, program.dtype, program.sizes[step.name])
                chosen = _measure(step, program, names, batch, elsewhere)
                known.add(layer, chosen)
        before = packed if packed and given and chosen == given.get(step.name) else {}
        bind(step, chosen, program, before.get(step.name), keep)
    known.write()


def layers(program: Program) -> set[str]:
    """The sizes of its convolutions."""
    return {_layer(step, program) for step in program.convolutions}


def _layer(step: Conv3x3, program: Program) -> str:
    """Steps that are called the same take about the same time."""
    outputs, inputs = step.weight.shape[:2]
    height, width = program.sizes[step.name]
    return f"{inputs} to {outputs} at {height}x{width}"


def _measure(step: Conv3x3, program: Program, names: list[str], batch: int, elsewhere: Tensor) -> str:
    """The fastest; the ones that usually are go first, so that others can be given up early."""
    least: dict[str, float] = {}
    given = _noise(step, program, batch)
    for name in reversed(names):
        v, run = _trial(step, program, name, given)
        least[name] = _least(v, run, elsewhere, min(least.values(), default=float("inf")))
    best = names[0]
    for name in names[1:]:
        heavy = _bytes(step, name, program) > LARGER * _bytes(step, best, program)
        best = name if least[name] < (HEAVY if heavy else MARGIN) * least[best] else best
    return best


def _bytes(step: Conv3x3, name: str, program: Program) -> int:
    """Of the weights that this algorithm reads."""
    if name == LIBRARY:
        return step.weight.numel() * program.dtype.itemsize
    return ops.conv3x3_pack(step.weight.to("meta"), name).nbytes


def _least(v: Values, run: Callable[[], None], elsewhere: Tensor, best: float) -> float:
    """The least seconds of a few runs: no more once it is clearly behind the best, or they are long enough to tell."""
    taken: list[float] = []
    while len(taken) < ROUNDS and (len(taken) < 2 or sum(taken) < SECONDS):
        taken.append(_seconds(v, run, elsewhere))
        if min(taken) > (1 + 0.5 / len(taken)) * best:
            break
    return min(taken)


def _noise(step: Conv3x3, program: Program, batch: int) -> Values:
    """What the step reads: one image of noise, `batch` times."""
    h, w = program.sizes[step.name]
    outputs, inputs = step.weight.shape[:2]
    generator = torch.Generator().manual_seed(0)  # not the caller's random state

    def noise(channels: int) -> Tensor:
        one = torch.randn(1, h, w, channels, generator=generator).to(program.dtype)
        return one.repeat(batch, 1, 1, 1).permute(0, 3, 1, 2)

    v: Values = [None] * program.values
    v[step.x] = noise(inputs)
    if step.residual is not None:
        v[step.residual] = noise(outputs)
    if step.norm is not None and step.norm.stats is not None:
        v[step.norm.stats] = torch.tensor([0.0, 1.0]).expand(batch, step.norm.groups, 2).contiguous()
    return v


def _trial(step: Conv3x3, program: Program, name: str, given: Values) -> tuple[Values, Callable[[], None]]:
    """The step on `given`. After a library's convolution a norm takes its statistics itself; after others it has them."""
    step, v = dataclasses.replace(step), list(given)
    if name == LIBRARY:
        bind(step, name, program)
    else:  # what packed weights hold does not change the time
        like = ops.conv3x3_pack(step.weight.to("meta"), name)
        bind(step, name, program, torch.full_like(like, 2.0**-8, device="cpu"))
    if name == LIBRARY and step.norm is not None and step.norm.stats is not None:
        v[step.norm.stats] = None
    batch = len(v[step.x])  # type: ignore[arg-type]
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

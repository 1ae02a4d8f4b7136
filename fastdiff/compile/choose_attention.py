"""What computes each attention on a GPU: the fused op, or the library's products and the back end that is fastest there.

No back end is fastest at every shape. As for convolutions: measured once for each shape at the program's batch, never the
call's, kept (`measured`), and fixed in the program. On other devices it is the fused op.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdiff.compile.attend import FUSED, LibraryAttention
from fastdiff.compile.choose import MARGIN
from fastdiff.compile.measured import choices
from fastdiff.compile.program import Program
from fastdiff.compile.steps import Attention, Values
from fastdiff.compile.timing import TIMERS, Timer, medians
from fastdiff.flags import exact
from fastdiff.ops.group_norm_attention import reference

# dtype -> back ends beside the fused op, in the order of preference at equal speed. cuDNN and flash have no float32.
CANDIDATES = {torch.float32: ("efficient", "math"), torch.bfloat16: ("cudnn", "flash", "efficient")}
# Error of a value, in units of the largest, that is allowed beside twice the fused op's: float32's class as of
# convolutions, which TF32 exceeds 200 times; bfloat16's last place.
CLASS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
# How a back end refuses: what PyTorch or CUDA raises, memory included; or it is another PyTorch, which calls it otherwise.
REFUSALS = (RuntimeError, TypeError, AttributeError)


def candidates(step: Attention, program: Program) -> list[str]:
    """The algorithms that may compute the step here, the fused op first."""
    if program.device.type not in TIMERS:
        return [FUSED]
    return [FUSED, *(name for name in CANDIDATES.get(program.dtype, ()) if _is_taken(name, step, program))]


def _is_taken(name: str, step: Attention, program: Program) -> bool:
    """Whether PyTorch would take the back end, now; "math" where scores take no more memory than q, k and v."""
    height, width = program.sizes[step.name]
    if name == "math" and height * width * step.heads > len(step.qkv[0]):
        return False
    x = step.qkv[0].new_empty(1, len(step.project[0]), height, width)
    try:
        return LibraryAttention(name, step.qkv, step.project, step.heads, step.out_scale).serves(x)
    except REFUSALS:
        return False


def bind(step: Attention, algorithm: str) -> None:
    """Prepare the step for the algorithm."""
    step.algorithm, step.library = algorithm, None
    if algorithm != FUSED:
        step.library = LibraryAttention(algorithm, step.qkv, step.project, step.heads, step.out_scale)


@torch.inference_mode()
def choose_attention(program: Program, batch: int = 1, given: Mapping[str, str] | None = None) -> None:
    """Bind every attention, to `given`'s algorithms or to the fastest at `batch` images here."""
    known = choices(program.dtype, batch, program.device)
    for step in program.attentions:
        names, layer = candidates(step, program), _layer(step, program)
        chosen = (given or {}).get(step.name, "") if len(names) > 1 else FUSED
        if chosen not in names:
            chosen = known.find(layer) or ""
        if chosen not in names:
            chosen = _measure(step, program, names, batch)
            known.add(layer, chosen)
        bind(step, chosen)
    known.write()


def _layer(step: Attention, program: Program) -> str:
    """Steps that are called the same take the same time."""
    channels, inner = step.project[0].shape
    height, width = program.sizes[step.name]
    return f"attention of {channels} by {step.heads} x {inner // step.heads} at {height}x{width}"


def _measure(step: Attention, program: Program, names: list[str], batch: int) -> str:
    """The fastest of those that run as graphs and whose replayed results are right.

    Captured on one image and judged on another: a kernel that escaped the capture leaves the first one's values.
    """
    timer = TIMERS[program.device.type](program.device)
    step, images = _of_noise(step, program)
    x = images[0].repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    with exact("lossless" if program.dtype == torch.float32 else "high"):
        tried = {name: _recorded(step, name, x, timer) for name in names}
        found = {name: result for name, result in tried.items() if result is not None}
        if FUSED not in found or len(found) == 1:
            return FUSED
        x.copy_(images[1].expand_as(x))
        right = _right(found, step, images[1:], program.dtype)
        if right == [FUSED]:
            return FUSED
        seconds = medians(timer, {name: found[name][0] for name in right})
    best = FUSED
    for name in right:
        best = name if seconds[name] < MARGIN * seconds[best] else best
    return best


Recorded = tuple[Callable[[], None], Values]


def _recorded(step: Attention, name: str, x: Tensor, timer: Timer) -> Recorded | None:
    """What replays the step, and its values; None where it is refused."""
    step, v = dataclasses.replace(step), [x, None]
    bind(step, name)
    try:
        return timer.record(lambda: step.run(v, [])), v
    except REFUSALS:
        return None


def _right(found: Mapping[str, Recorded], step: Attention, image: Tensor, dtype: torch.dtype) -> list[str]:
    """The names whose results for copies of the image are as near to float64's as the fused op's are."""
    try:
        truth = _truth(step, image)
    except torch.OutOfMemoryError:
        return [FUSED]
    errors = {}
    for name, (replay, v) in found.items():
        v[step.out].fill_(float("nan"))  # type: ignore[union-attr]
        replay()
        y = v[step.out]
        assert y is not None
        errors[name] = float(torch.stack([(one.double() - truth).abs().max() for one in y]).max())  # NaN where one is
    allowed = 2 * errors[FUSED] + CLASS[dtype] * float(truth.abs().max())
    return [name for name, error in errors.items() if name == FUSED or error <= allowed]


def _truth(step: Attention, image: Tensor) -> Tensor:
    """The step's value of one image in float64."""
    n = step.norm
    weights = [t.double() for t in (*step.qkv, *step.project)]
    scale = (step.project[0].shape[1] // step.heads) ** -0.5
    given = (n.groups, n.eps, *weights, step.heads, scale, step.out_scale, None)
    return reference(image.double(), n.weight.double(), n.bias.double(), *given)[0]


def _of_noise(step: Attention, program: Program) -> tuple[Attention, Tensor]:
    """The step with other weights, from value 0 to value 1, and two images for it [2, C, H, W].

    The weights that are compared do not matter to the clock, but to errors: those of a network that is not trained yet are
    zeros, which would hide them. Scores have a standard deviation of about 3: a softmax neither flat nor a maximum.
    """
    generator = torch.Generator().manual_seed(0)  # not the caller's random state
    channels, inner = step.project[0].shape

    def noise(*shape: int, dtype: torch.dtype = program.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(program.device, dtype)

    weight, bias = (noise(channels, dtype=torch.float32, mean=mean, std=0.25) for mean in (1.0, 0.0))
    step = dataclasses.replace(
        step,
        out=1,
        x=0,
        norm=dataclasses.replace(step.norm, weight=weight, bias=bias, stats=None),
        qkv=(noise(3 * inner, channels, std=(3 / channels) ** 0.5), noise(3 * inner)),
        project=(noise(channels, inner, std=inner**-0.5), noise(channels)),
    )
    return step, noise(2, channels, *program.sizes[step.name])

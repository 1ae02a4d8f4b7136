"""Program: the flat form of a network, callable as the network is."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.compile.conditions import Conditions
from fastdiff.compile.lower import Lowering
from fastdiff.compile.spill import trim
from fastdiff.compile.steps import Attention, Conv3x3, Values
from fastdiff.unet import UNet

LIBRARY = "library"  # an algorithm beside those of ops.conv3x3, see library.py
LIGHT = 2e6  # weights, up to which it is values that leave the processor's caches, and
TOGETHER = 3e6  # bytes of one value of as many images as are computed together, for each thread


class Program:
    """F(x, c_noise, labels, augment_labels) of one network, in `dtype`, for images of about `size`.

    x and the result are [B, C, H, W] of any floating type. It holds no buffers of its own, so that threads may call it at
    once; it follows the weights where it shares them with the network, not where they are packed: after a change of
    weights make a new one.
    """

    def __init__(self, network: UNet, dtype: torch.dtype, size: tuple[int, int]):
        lowered = Lowering(network, dtype, size)
        self.network, self.dtype, self.size = network, dtype, size
        self.steps, self.values, self.output = lowered.steps, lowered.values, lowered.output.number
        self.operations, self.sizes = lowered.operations, lowered.sizes
        self.conditions = Conditions(network, lowered.conditions)
        self.unused = self._last_uses()
        self.others: set[tuple[int, int]] = set()  # sizes that it was not made for, and met
        self.where = ""  # its weights are, if not in memory
        self.trimmed = False
        self.factor = 2 ** (len(network.config.multipliers) - 1)
        self.together: int | None = None  # images for each thread; None for any number
        if is_light(network):
            self.together = max(1, int(TOGETHER / (4 * lowered.largest)))

    def _last_uses(self) -> list[list[int]]:
        """The values that nothing needs after each step."""
        last: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            last |= {number: i for number in step.reads if number is not None}
        last.pop(self.output, None)
        return [[number for number, at in last.items() if at == i] for i in range(len(self.steps))]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def convolutions(self) -> list[Conv3x3]:
        return [step for step in self.steps if isinstance(step, Conv3x3)]

    @property
    def algorithms(self) -> dict[str, str]:
        """Convolution -> the algorithm that computes it."""
        return {step.name: step.algorithm for step in self.convolutions}

    @property
    def attentions(self) -> list[Attention]:
        return [step for step in self.steps if isinstance(step, Attention)]

    @property
    def attention_algorithms(self) -> dict[str, str]:
        """Attention -> "fused", or the back end that computes it between the library's products."""
        return {step.name: step.algorithm for step in self.attentions}

    def tabulate(self, times: Sequence[float]) -> None:
        """Compute what unconditional blocks get at the c_noise `times` now rather than at the first call."""
        if self.network.label is None and self.device.type == "cpu":
            self.conditions(torch.tensor(times, dtype=torch.float32), None, None)

    def _say(self, height: int, width: int) -> None:
        """Once for each size that the program was not made for."""
        if (height, width) not in self.others:
            self.others.add((height, width))
            warnings.warn(
                f"x: {height} x {width} is computed by the algorithms that are fastest at {self.size[0]} x {self.size[1]}; "
                f"fastdiff.compile(model, size=({height}, {width})) measures its own",
                stacklevel=4,
            )

    @torch.inference_mode()
    def __call__(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(
                f"x: {x.shape[-2]} x {x.shape[-1]} cannot be halved to the last level; use multiples of {self.factor}"
            )
        if x.shape[-2:] != self.size:
            self._say(x.shape[-2], x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            c = self.conditions(c_noise, labels, augment_labels)
            if self.where and not self.trimmed:
                self.trimmed = True
                trim()  # by now a caller who wanted the program alone has let go of what it was made of
            together = len(x) if self.together is None else self.together * torch.get_num_threads()
            if len(x) <= together:
                return self._run(x, c)
            parts = zip(x.split(together), *(rows.split(together) for rows in c), strict=True)
            return torch.cat([self._run(part, rows) for part, *rows in parts])

    def _run(self, x: Tensor, c: Sequence[Tensor]) -> Tensor:
        v: Values = [None] * self.values
        v[0] = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for step, unused in zip(self.steps, self.unused, strict=True):
            step.run(v, c)
            for number in unused:
                v[number] = None
        y = v[self.output]
        assert y is not None
        return y.to(x.dtype)


def is_light(network: UNet) -> bool:
    """Whether it has few weights, and is on a CPU."""
    weights = list(network.parameters())
    return weights[0].device.type == "cpu" and sum(p.numel() for p in weights) <= LIGHT

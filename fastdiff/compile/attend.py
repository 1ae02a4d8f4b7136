"""Attention by PyTorch's library: two matrix products around one back end of `scaled_dot_product_attention`.

A back end is called by its own function. `torch.nn.attention.sdpa_kernel` around the public one sets flags of the whole
process: another thread's attention would run under them, and two threads could leave them changed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FUSED = "fused"  # the algorithm that is not here: ops.group_norm_attention


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, scale=scale)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False, scale=scale)[0]


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Scores in memory, on any device."""
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, scale=scale)[0]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": _math,
}
# What PyTorch asks before it takes a back end: the GPU, the shape, and whether the user has switched it off.
CHECKS: dict[str, Callable[..., bool]] = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
    "efficient": torch.backends.cuda.can_use_efficient_attention,
    "math": lambda params, debug: torch.backends.cuda.math_sdp_enabled(),
}


class LibraryAttention:
    """(x + W_out softmax(scale q^T k) v + b_out) out_scale with q, k, v = W_qkv h + b_qkv and scale = 1 / sqrt(E / heads).

    qkv: W_qkv [3 E, C] and its bias, the rows of q, then k, then v, each head after head; project: W_out [C, E] and its
    bias. Weights are read where they lie. q, k and v are views of one product with its bias. The last product is added to
    (x + b_out) out_scale, with out_scale as its factor: two passes, as many as product and bias, then residual, would take.
    """

    def __init__(
        self, backend: str, qkv: tuple[Tensor, Tensor], project: tuple[Tensor, Tensor], heads: int, out_scale: float
    ):
        self.backend, self.attend = backend, BACKENDS[backend]
        self.qkv, self.project, self.heads, self.out_scale = qkv, project, heads, out_scale
        self.bias = project[1] * out_scale
        self.scale = (project[0].shape[1] // heads) ** -0.5

    def __call__(self, x: Tensor, h: Tensor) -> Tensor:
        """x and h, the normalised x, [N, C, H, W], channels-last where nothing is to be copied; like x."""
        n, c, height, width = x.shape
        weight, bias = self.qkv
        rows = torch.addmm(bias, _rows(h), weight.mT)  # [N pixels, 3 E]
        q, k, v = self._heads(rows, n, height * width)
        a = self.attend(q, k, v, self.scale)
        a = a.transpose(1, 2).reshape(n * height * width, len(weight) // 3)  # a view
        y = torch.add(self.bias, _rows(x), alpha=self.out_scale)
        y.addmm_(a, self.project[0].mT, alpha=self.out_scale)
        y = y.view(n, height, width, c).permute(0, 3, 1, 2)
        return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)

    def _heads(self, rows: Tensor, n: int, pixels: int) -> tuple[Tensor, ...]:
        """[N pixels, 3 E] -> q, k, v [N, heads, pixels, E / heads]."""
        width = rows.shape[1] // 3 // self.heads
        return rows.view(n, pixels, 3, self.heads, width).permute(2, 0, 3, 1, 4).unbind(0)

    def serves(self, x: Tensor) -> bool:
        """Whether PyTorch would take the back end for such an x; nothing is said."""
        n, _, height, width = x.shape
        q, k, v = self._heads(x.new_empty(n * height * width, len(self.qkv[0])), n, height * width)
        return CHECKS[self.backend](torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False), False)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)

"""group_norm_silu against PyTorch's group_norm and silu. Traffic: x read, y written; the exponential bounds it on CPUs."""

import pytest
import torch
from torch.nn import functional

from fastdiff import ops

CASES = [  # N, C, H = W, dtype, layout: levels of the DDPM CIFAR-10 net and of ADM's ImageNet-64 net, batch 1 included
    (8, 128, 32, torch.float32, torch.channels_last),
    (8, 256, 16, torch.bfloat16, torch.channels_last),
    (1, 256, 32, torch.bfloat16, torch.channels_last),
    (4, 192, 64, torch.bfloat16, torch.channels_last),
    (8, 128, 32, torch.float32, torch.contiguous_format),
]


def name_of(case) -> str:
    n, c, size, dtype, layout = case
    return f"{n}x{c}x{size}x{size} {str(dtype)[6:]} {'nhwc' if layout == torch.channels_last else 'nchw'}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_group_norm_silu(compare, device, case, backward):
    n, c, size, dtype, layout = case
    x = torch.randn(n, c, size, size, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_(backward)
    weight, bias = (torch.randn(c, device=device).requires_grad_(backward) for _ in range(2))
    dy = torch.randn_like(x)

    def plain(x, weight, bias):
        return functional.silu(functional.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype), 1e-6))

    compiled = torch.compile(plain)

    def ours(x, weight, bias):
        return ops.group_norm_silu(x, weight, bias, 32, 1e-6)

    def call(fn):
        y = fn(x, weight, bias)
        return torch.autograd.grad(y, (x, weight, bias), dy) if backward else y

    def check():
        # twice the error of plain PyTorch at this dtype, and a floor of one rounding of the largest value
        truth = plain(x.detach().double(), weight.detach().double(), bias.detach().double())
        floor = torch.finfo(dtype).eps * float(truth.abs().max())
        theirs = float((plain(x, weight, bias).detach().double() - truth).abs().max())
        assert float((ours(x, weight, bias).detach().double() - truth).abs().max()) <= 2 * theirs + floor

    variants = {"fastdiff": lambda: call(ours), "pytorch": lambda: call(plain), "compile": lambda: call(compiled)}
    moved = (2 + 3 * backward) * x.nbytes  # backward: x and dy read, dx written, on top of the forward pass
    compare("group_norm_silu", name_of(case) + (" fwd+bwd" if backward else ""), variants, check, moved=moved)

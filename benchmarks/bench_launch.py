"""What one eager call costs, in microseconds: every op on tensors so small that only the launch counts, and ATen's nearest.

On a GPU the call returns before the kernel has run, so this is the host's cost; "ms replayed" is the kernel's own time.
"""

import pytest
import torch
from torch.nn import functional

from fastdiff import ops


def philox_normal(device):
    seeds = ops.seed_tensor([1], device)
    return lambda: ops.philox_normal(seeds, 0, (4, 4, 4)), lambda: torch.randn(1, 4, 4, 4, device=device), "randn"


def add_noise(device):
    x, seeds, forms = (
        torch.zeros(1, 4, 4, 4, device=device),
        ops.seed_tensor([1], device),
        torch.ones(1, 2, 2, device=device),
    )
    return lambda: ops.add_noise(x, seeds, forms), lambda: torch.randn_like(x), "randn_like"


def schedule_coefficients(device):
    t = torch.ones(4, device=device)
    return lambda: ops.schedule_coefficients(t, 0), lambda: torch.exp(t), "exp"


def denoise_step(device):
    from fastdiff.ops.denoise_step import C, K

    x = torch.zeros(1, 4, 4, 4, device=device)
    none, history, net_in, seeds = x.new_empty(0), x.new_empty(0, *x.shape), x.clone(), ops.seed_tensor([1], device)
    codes = torch.zeros(1, len(K), dtype=torch.int32, device=device)
    codes[0, K.SAVE_D] = -1
    tables = (torch.zeros(1, len(C), device=device), codes, torch.zeros(1, dtype=torch.int64, device=device))
    return lambda: ops.denoise_step(x, x, none, history, net_in, seeds, *tables), lambda: x.add_(x), "add_"


def langevin_step(device):
    from fastdiff.ops.langevin_step import L

    x = torch.zeros(1, 4, 4, 4, device=device)
    seeds, net_in, table = ops.seed_tensor([1], device), x.clone(), torch.zeros(1, len(L), device=device)
    rest = (torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    return lambda: ops.langevin_step(x, x, net_in, seeds, table, *rest), lambda: torch.linalg.vector_norm(x), "vector_norm"


def group_norm_silu(device):
    x, w = torch.zeros(1, 4, 4, 4, device=device), torch.ones(4, device=device)
    return lambda: ops.group_norm_silu(x, w, w, 2), lambda: functional.group_norm(x, 2, w, w), "group_norm"


def group_norm_attention(device):
    x, w = torch.zeros(1, 8, 4, 4, device=device), torch.ones(8, device=device)
    qkv, out, q = (
        torch.zeros(24, 8, device=device),
        torch.zeros(8, 8, device=device),
        torch.zeros(1, 1, 16, 8, device=device),
    )
    ours = lambda: ops.group_norm_attention(x, w, w, 2, qkv, None, out, None, 1)  # noqa: E731
    return ours, lambda: functional.scaled_dot_product_attention(q, q, q), "scaled_dot_product_attention"


def conv3x3(device):
    x, w = torch.zeros(1, 8, 4, 4, device=device), torch.zeros(8, 8, 3, 3, device=device)
    return lambda: ops.conv3x3(x, w), lambda: functional.conv2d(x, w, padding=1), "conv2d"


def conv3x3_pack(device):
    w = torch.zeros(8, 8, 3, 3, device=device)
    return lambda: ops.conv3x3_pack(w, "winograd4_lean"), lambda: w.permute(1, 2, 3, 0).contiguous(), "contiguous"


def conv1x1(device):
    x = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(16, 16, device=device), torch.randn(16, device=device)
    packed, weight = ops.conv1x1_pack(w), w[..., None, None]
    return lambda: ops.conv1x1(x, packed, b), lambda: torch.nn.functional.conv2d(x, weight, b), "conv2d"


def conv3x3_weight_gradient(device):
    x, w = torch.zeros(1, 8, 4, 4, device=device), torch.zeros(8, 8, 3, 3, device=device)
    rest = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    theirs = lambda: torch.ops.aten.convolution_backward(x, x, w, *rest)  # noqa: E731
    return lambda: ops.conv3x3_weight_gradient(x, x), theirs, "convolution_backward"


def resample(device):
    x, taps = torch.zeros(1, 4, 4, 4, device=device), torch.ones(2, device=device)
    return lambda: ops.resample(x, taps, down=2), lambda: functional.avg_pool2d(x, 2), "avg_pool2d"


def embedding(device):
    t, freqs = torch.ones(4, device=device), torch.ones(8, device=device)
    return lambda: ops.embedding(t, freqs), lambda: torch.outer(t, freqs), "outer"


CASES = {
    fn.__name__: fn
    for fn in (
        philox_normal, add_noise, schedule_coefficients, denoise_step, langevin_step, group_norm_silu, group_norm_attention,
        conv3x3, conv3x3_pack, conv3x3_weight_gradient, conv1x1, resample, embedding,
    )
}  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_launch(compare, device, op):
    if not hasattr(ops, op):
        pytest.skip(f"{op} is not an op of this version")
    with torch.inference_mode():
        ours, aten, name = CASES[op](device)

        def check():
            ours(), aten()

        compare(op, f"one call, beside {name}", {"fastdiff": ours, "pytorch": aten}, check, calls=1)

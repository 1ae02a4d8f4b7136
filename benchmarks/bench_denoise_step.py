"""denoise_step against the same update in plain PyTorch. Traffic: x read and written, F read, next input written."""

import pytest
import torch

from fastdiff import ops
from fastdiff.ops.denoise_step import C, K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "deterministic"])
def test_denoise_step(compare, device, dtype, noisy):
    x = torch.randn(64, 3, 64, 64, device=device)
    F = torch.randn_like(x).to(dtype)
    net_in, seeds = torch.empty_like(F), ops.seed_tensor(range(64), device)
    table = torch.zeros(1, len(C), device=device)
    table[0, C.SKIP], table[0, C.OUT], table[0, C.X], table[0, C.D_CLIP] = 0.7, -0.6, 0.5, 0.5
    table[0, C.NEXT_IN], table[0, C.N1] = 0.9, 0.1 if noisy else 0.0
    codes = torch.zeros(1, len(K), dtype=torch.int32, device=device)
    codes[0, K.SAVE_D] = -1
    row = torch.zeros(1, dtype=torch.int64, device=device)
    none, history = x.new_empty(0), x.new_empty((0, *x.shape))

    def plain(x, F):
        d = (0.7 * x - 0.6 * F.float()).clamp(-1, 1)
        x = 0.5 * x + 0.5 * d
        x = x + 0.1 * torch.randn_like(x) if noisy else x
        return x, (0.9 * x).to(F.dtype)

    def step(x):
        ops.denoise_step(x, F, none, history, net_in, seeds, table, codes, row)

    def check():
        y = x.clone()
        step(y)
        expected = 0.5 * x + 0.5 * (0.7 * x - 0.6 * F.float()).clamp(-1, 1)
        if noisy:
            expected = expected + 0.1 * ops.philox_normal(seeds, 0, x.shape[1:], domain=ops.Domain.STEP)
        torch.testing.assert_close(y, expected)

    compiled = torch.compile(plain)
    state = x.clone()
    variants = {"fastdiff": lambda: step(state), "pytorch": lambda: plain(x, F), "compile": lambda: compiled(x, F)}
    moved = 2 * x.nbytes + 2 * F.nbytes
    name = f"64x3x64x64, network {str(dtype)[6:]}, {'noise' if noisy else 'no noise'}"
    compare("denoise_step", name, variants, check, moved=moved)

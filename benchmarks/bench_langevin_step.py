"""langevin_step against score SDE's corrector in plain PyTorch. Traffic: x, F read twice, x and the next input written."""

import pytest
import torch

from fastdiff import ops
from fastdiff.ops.langevin_step import Norms, langevin_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [32, 64])
def test_langevin_step(compare, device, size, dtype):
    x = torch.randn(64, 3, size, size, device=device)
    F = torch.randn_like(x).to(dtype)
    net_in, seeds = torch.empty_like(F), ops.seed_tensor(range(64), device)
    row = langevin_row(c_skip=0.7, c_out=-0.6, alpha=0.9, sigma=0.8, step=2 * 0.16**2, next_in=0.9)
    table, draws = torch.tensor([row], device=device), torch.zeros(1, dtype=torch.int32, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)

    def plain(x, F, noise=torch.randn_like):
        score = (0.9 * (0.7 * x - 0.6 * F.float()) - x) / 0.8**2
        z = noise(x)
        ratio = z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)
        eps = (2 * (0.16 * ratio) ** 2)[:, None, None, None]
        x = x + eps * score + (2 * eps).sqrt() * z
        return x, (0.9 * x).to(F.dtype)

    def step(x):
        ops.langevin_step(x, F, net_in, seeds, table, draws, index, Norms.SAMPLE)

    def check():
        y = x.clone()
        step(y)
        z = ops.philox_normal(seeds, 0, x.shape[1:], domain=ops.Domain.STEP)
        torch.testing.assert_close(y, plain(x, F, lambda x: z)[0], rtol=1e-5, atol=1e-5)

    compiled = torch.compile(plain)
    state = x.clone()
    variants = {"fastdiff": lambda: step(state), "pytorch": lambda: plain(x, F), "compile": lambda: compiled(x, F)}
    moved = 3 * x.nbytes + 3 * F.nbytes
    compare("langevin_step", f"64x3x{size}x{size}, network {str(dtype)[6:]}", variants, check, moved=moved)

"""add_noise against the same arithmetic in plain PyTorch with torch.randn. Traffic: x0 read, x_t and target written."""

import torch
from instructions import issued

from fastdiff import ops


def test_add_noise(compare, device):
    x0 = torch.rand(64, 3, 64, 64, device=device) * 2 - 1
    seeds = ops.seed_tensor(range(64), device)
    coefficients = torch.rand(64, 2, 2, device=device)  # x_t and target, two linear forms in (x0, n)

    def plain(x0, c):
        n = torch.randn_like(x0)
        c = c.flatten(1).t().reshape(4, -1, 1, 1, 1)
        return c[0] * x0 + c[1] * n, c[2] * x0 + c[3] * n

    def check():
        ours = ops.add_noise(x0, seeds, coefficients)
        n = ops.philox_normal(seeds, 0, x0.shape[1:], domain=ops.Domain.TRAINING)
        c = coefficients.reshape(64, 2, 2, 1, 1, 1)
        torch.testing.assert_close(ours, torch.stack([c[:, k, 0] * x0 + c[:, k, 1] * n for k in (0, 1)]))

    compiled = torch.compile(plain)
    variants = {
        "fastdiff": lambda: ops.add_noise(x0, seeds, coefficients),
        "pytorch": lambda: plain(x0, coefficients),
        "compile": lambda: compiled(x0, coefficients),
    }
    issue = issued("add_noise", "float32", x0.numel())
    compare("add_noise", "64x3x64x64 float32, x_t and target", variants, check, moved=3 * x0.nbytes, **issue)

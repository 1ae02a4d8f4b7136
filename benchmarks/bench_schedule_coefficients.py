"""schedule_coefficients against the same columns in PyTorch. Traffic: times and results; launches are what it costs."""

import pytest
import torch

from fastdiff import ops
from fastdiff.ops.schedule_coefficients import Law, Target


@pytest.mark.parametrize("batch", [64, 4096])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_schedule_coefficients(compare, device, batch, backward):
    t = (torch.rand(batch, device=device, dtype=torch.float64) * 0.999 + 1e-3).requires_grad_(backward)
    sd, grad = 0.5, torch.randn(batch, 7, device=device, dtype=torch.float64)

    def plain(t):  # VP with EDM's preconditioning
        log = -0.5 * t**2 * 19.9 - t * 0.1
        a, s = (log / 2).exp(), (-log.expm1()).sqrt()
        r = s / a
        h = (r**2 + sd**2).sqrt()
        return torch.stack((a, s, -2 * r.log(), sd**2 / h**2 / a, r * sd / h, 1 / (a * h), r.log() / 4), -1)

    def ours(t):
        return ops.schedule_coefficients(t, Law.VP, Target.EDM, 0.1, 20.0, sigma_data=sd)

    def check():
        torch.testing.assert_close(ours(t), plain(t), rtol=1e-12, atol=1e-13)

    compiled = torch.compile(plain)

    def call(fn):
        return torch.autograd.grad(fn(t), t, grad) if backward else fn(t)

    variants = {"fastdiff": lambda: call(ours), "pytorch": lambda: call(plain), "compile": lambda: call(compiled)}
    name = f"VP, EDM, {batch} times{' fwd+bwd' if backward else ''}"
    compare("schedule_coefs", name, variants, check, moved=(1 + backward) * 8 * 8 * batch)

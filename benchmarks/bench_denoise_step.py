"""denoise_step against the same update in plain PyTorch. Traffic: x read and written, F read, next input written, and F_u
(guided), V (learned) and a second copy of the next input (guided) where a row has them."""

import math

import pytest
import torch
from instructions import issued

from fastdiff import ops
from fastdiff.ops.denoise_step import C, K

SHAPE = (64, 3, 64, 64)
LOW, HIGH, WEIGHT = math.log(1e-4), math.log(1e-2), 1.5  # log variances; guidance weight


def tables(device, noisy, guided, learned):
    table = torch.zeros(1, len(C), device=device)
    table[0, [C.SKIP, C.OUT, C.X, C.D_CLIP]] = torch.tensor([0.7, -0.6, 0.5, 0.5], device=device)
    table[0, [C.NEXT_IN, C.N1]] = torch.tensor([0.9, 0.1 if noisy and not learned else 0.0], device=device)
    table[0, [C.GUIDE, C.N_V, C.LOG_MIN, C.LOG_MAX]] = torch.tensor([guided, learned, LOW, HIGH], device=device)
    codes = torch.zeros(1, len(K), dtype=torch.int32, device=device)
    codes[0, K.SAVE_D] = -1
    return table, codes


def update(x, F, F_u, V, z):
    """x' of the row in `tables`, z its noise or None."""
    f = F.float()
    if F_u is not None:
        f = F_u.float() + WEIGHT * (f - F_u.float())
    x = 0.5 * x + 0.5 * (0.7 * x - 0.6 * f).clamp(-1, 1)
    if V is not None:
        v = (V.float() + 1) / 2
        return x + torch.exp((v * HIGH + (1 - v) * LOW) / 2) * z
    return x if z is None else x + 0.1 * z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("noisy", "guided", "learned", "mixed"),
    [(1, 0, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1)],
    ids=["noise", "deterministic", "guided", "learned", "channels-last", "noise-channels-last"],
)
def test_denoise_step(compare, device, dtype, noisy, guided, learned, mixed):
    """mixed: the network in channels-last, x contiguous, as the sampling loop has them."""
    layout = torch.channels_last if mixed else torch.contiguous_format
    x, seeds = torch.randn(SHAPE, device=device), ops.seed_tensor(range(SHAPE[0]), device)
    F, F_u, V = (torch.randn_like(x).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    F_u, V = F_u if guided else None, V.clamp(-1, 1) if learned else None
    net_in = torch.empty_like(torch.cat((F, F))) if guided else torch.empty_like(F)
    weight = torch.full((1,), WEIGHT, device=device) if guided else None
    (table, codes), row = tables(device, noisy, guided, learned), torch.zeros(1, dtype=torch.int64, device=device)
    none, history = x.new_empty(0), x.new_empty((0, *x.shape))

    def plain(x, F):
        x = update(x, F, F_u, V, torch.randn_like(x) if noisy else None)
        y = (0.9 * x).to(F.dtype)
        return x, torch.cat((y, y)) if guided else y

    def step(x):
        ops.denoise_step(x, F, none, history, net_in, seeds, table, codes, row, F_u, weight, V)

    def check():
        y = x.clone()
        step(y)
        z = ops.philox_normal(seeds, 0, x.shape[1:], domain=ops.Domain.STEP) if noisy else None
        expected = update(x, F, F_u, V, z)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(net_in, (0.9 * expected).to(dtype).repeat(1 + guided, 1, 1, 1))

    compiled = torch.compile(plain)
    state = x.clone()
    variants = {"fastdiff": lambda: step(state), "pytorch": lambda: plain(x, F), "compile": lambda: compiled(x, F)}
    moved = 2 * x.nbytes + F.nbytes + net_in.nbytes + sum(t.nbytes for t in (F_u, V) if t is not None)
    terms = (("noise", noisy), ("guided", guided), ("learned", learned), ("channels-last", mixed))
    case = str(dtype)[6:], " ".join(word for word, on in terms if on) or "no noise"
    name = f"64x3x64x64, network {', '.join(case)}"
    compare("denoise_step", name, variants, check, moved=moved, **issued("denoise_step", case, x.numel()))

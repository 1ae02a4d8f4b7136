"""Augmentation: every kind against moving pixels by hand, its frequency, what the network is told, whose it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastdiff import ops
from fastdiff.training import augment


def seeds(n):
    return ops.seed_tensor(range(1000, 1000 + n))


def smooth(size=32):
    """A picture without fine detail, so that interpolation is near exact, and without symmetry."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    return (0.4 * torch.sin(2 * x + 0.5) + 0.3 * torch.cos(1.5 * y + x)).reshape(1, 1, size, size)


def test_flip():
    x = torch.arange(400 * 6, dtype=torch.float32).reshape(400, 1, 2, 3)
    y = augment.flipped(x, seeds(400))
    mirrored = (y == x.flip(3)).flatten(1).all(1)
    assert torch.equal(y[~mirrored], x[~mirrored]) and abs(mirrored.float().mean() - 0.5) <= 4 * 0.5 / 20
    part = augment.flipped(x[100:150], seeds(400)[100:150])
    assert torch.equal(part, y[100:150]), "a sample's flip depends on its batch"


def test_nothing_is_told_where_nothing_happens():
    """Without augmentations only the x flip is left; told a 0, an image is as it was."""
    x = torch.rand(64, 3, 8, 8) * 2 - 1
    y, told = augment.augmented(x, seeds(64), 0.0)
    assert told.shape == (64, 9) and not told[:, 1:].any()
    kept = told[:, 0] == 0
    assert torch.equal(y[kept], x[kept]) and torch.equal(y[~kept], x[~kept].flip(3)) and 10 < kept.sum() < 54


def test_frequencies():
    told = augment.augmented(torch.zeros(4000, 1, 4, 4), seeds(4000), 0.12)[1]
    happened = torch.stack([told[:, 2] != 0, told[:, 4] != 0, told[:, 5] != 0, told[:, 7] != 0], 1).double().mean(0)
    bound = 4 * math.sqrt(0.12 * 0.88 / 4000)
    assert ((happened - 0.12).abs() <= bound).all() and abs(told[:, 1].mean() - 0.06) <= bound


@pytest.mark.parametrize("kind", ["scale", "turn", "stretch", "shift"])
def test_geometry(kind, monkeypatch):
    """One augmentation at a time against the function itself, read where the picture's points came from."""
    x = smooth().expand(8, -1, -1, -1)
    zero = torch.zeros(8)
    a = dict.fromkeys(("x", "y", "scale", "turn", "along", "stretch", "dx", "dy"), zero)
    amount = torch.linspace(-0.5, 0.5, 8)
    a |= {"scale": {"scale": amount}, "turn": {"turn": amount}, "stretch": {"stretch": amount, "along": amount + 0.3},
          "shift": {"dx": amount, "dy": -amount}}[kind]  # fmt: skip
    monkeypatch.setattr(augment, "_draws", lambda *_: (a, torch.ones(8, dtype=torch.bool)))
    got, told = augment.augmented(x, seeds(8), 1.0)
    v, u = torch.meshgrid(*[(torch.arange(32) + 0.5) / 16 - 1] * 2, indexing="ij")
    for i in range(8):
        s = float(amount[i])
        if kind == "scale":
            p, q = u * 2 ** (-0.2 * s), v * 2 ** (-0.2 * s)
        elif kind == "turn":
            p, q = math.cos(s) * u + math.sin(s) * v, -math.sin(s) * u + math.cos(s) * v
        elif kind == "shift":
            p, q = u - s / 4, v + s / 4
        else:
            c, d = math.cos(s + 0.3), math.sin(s + 0.3)
            along, across = (c * u + d * v) * 2 ** (-0.2 * s), (-d * u + c * v) * 2 ** (0.2 * s)
            p, q = c * along - d * across, d * along + c * across
        inside = (p.abs() < 0.9) & (q.abs() < 0.9)
        grid = torch.stack((p, q), -1)[None]
        expected = F.grid_sample(x[i : i + 1], grid, "bicubic", "border", align_corners=False)
        assert (got[i] - expected[0])[0][inside].abs().max() <= 2e-5, (kind, i)
    assert told.abs().sum() > 0


def test_sizes_are_edms():
    """Shifts are eighths of the size and scales 2^0.2 per standard deviation, over many draws."""
    a, _ = augment._draws(seeds(4000), 1.0)
    for name in ("scale", "stretch", "dx", "dy"):
        assert abs(float(a[name].std()) - 1) <= 4 / math.sqrt(2 * 4000) and abs(float(a[name].mean())) <= 4 / math.sqrt(4000)
    assert a["turn"].abs().max() <= math.pi and a["turn"].abs().max() > 3 and abs(float(a["y"].mean()) - 0.5) <= 4 * 0.5 / 63

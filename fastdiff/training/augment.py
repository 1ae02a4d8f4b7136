"""Flips and EDM's non-leaky augmentation, on the device, as functions of the sample's seed.

Every augmentation is told to the network as numbers that are 0 for none (Karras et al. 2022, appendix F.2), so that images
drawn without them look like the data. Sizes are those of EDM's table 6:

    x flip            a0 in {0, 1}, half of all images            told a0
    y flip            a1 in {0, 1}                                told a1
    scaling           (2^0.2)^a2,  a2 ~ N(0, 1)                   told a2
    rotation          a3 ~ U(-pi, pi)                             told cos a3 - 1, sin a3
    stretching        (2^0.2)^a5 along a4 ~ U(-pi, pi)            told a5 cos a4, a5 sin a4
    translation       a6, a7 ~ N(0, 1) eighths of the size        told a6, a7

Each but the x flip happens with the given probability. Where only flips happen pixels are moved, not interpolated;
otherwise they are read bicubically with mirrored borders (the original filters with wavelets instead).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from fastdiff.training.losses import Draw

LABELS = 9  # numbers that describe an image's augmentation
SCALE = ANISOTROPY = 2**0.2
SHIFT = 1 / 8


def flipped(x: Tensor, seeds: Tensor) -> Tensor:
    """Images [B, C, H, W], every other one mirrored left to right, by seeds [B]."""
    heads = ops.philox_normal(seeds, Draw.FIRST_AUGMENTATION, (1,), domain=ops.Domain.AUGMENT) < 0
    return torch.where(heads.reshape(-1, 1, 1, 1), x.flip(3), x)


def augmented(x: Tensor, seeds: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] -> augmented ones, and what the network is told, [B, 9]."""
    a, on = _draws(seeds, probability)
    told = torch.stack(
        [
            a["x"], a["y"], a["scale"], a["turn"].cos() - 1, a["turn"].sin(),
            a["stretch"] * a["along"].cos(), a["stretch"] * a["along"].sin(), a["dx"], a["dy"],
        ],
        1,
    )  # fmt: skip
    moved = torch.where(a["x"].bool().reshape(-1, 1, 1, 1), x.flip(3), x)
    moved = torch.where(a["y"].bool().reshape(-1, 1, 1, 1), moved.flip(2), moved)
    grid = F.affine_grid(_inverse(a)[:, :2], list(x.shape), align_corners=False)
    read = F.grid_sample(moved.float(), grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1).to(x.dtype)
    return torch.where(on.reshape(-1, 1, 1, 1), read, moved), told


def _draws(seeds: Tensor, probability: float) -> tuple[dict[str, Tensor], Tensor]:
    """a0 ... a7 [B], 0 where an augmentation does not happen; and whether any happens that interpolates."""
    z = ops.philox_normal(seeds, Draw.FIRST_AUGMENTATION, (16,), domain=ops.Domain.AUGMENT)  # element 0 is `flipped`'s
    u = torch.special.ndtr(z)
    does = (u[:, 1:6] < probability).float()  # y flip, scaling, rotation, stretching, translation
    a = {
        "x": (z[:, 0] < 0).float(),
        "y": does[:, 0] * (z[:, 6] < 0),
        "scale": does[:, 1] * z[:, 7],
        "turn": does[:, 2] * math.pi * (2 * u[:, 8] - 1),
        "along": does[:, 3] * math.pi * (2 * u[:, 9] - 1),
        "stretch": does[:, 3] * z[:, 10],
        "dx": does[:, 4] * z[:, 11],
        "dy": does[:, 4] * z[:, 12],
    }
    return a, does[:, 1:].sum(1) > 0


def _inverse(a: dict[str, Tensor]) -> Tensor:
    """[B, 3, 3]: where an output pixel is read, in coordinates from -1 to 1."""
    one, zero = torch.ones_like(a["x"]), torch.zeros_like(a["x"])

    def matrix(*rows):
        return torch.stack([torch.stack(row, 1) for row in rows], 1)

    def rotation(angle):
        return matrix((angle.cos(), -angle.sin(), zero), (angle.sin(), angle.cos(), zero), (zero, zero, one))

    def scaling(x, y):
        return matrix((x, zero, zero), (zero, y, zero), (zero, zero, one))

    size, stretch = SCALE ** -a["scale"], ANISOTROPY ** a["stretch"]
    shift = matrix((one, zero, -2 * SHIFT * a["dx"]), (zero, one, -2 * SHIFT * a["dy"]), (zero, zero, one))
    aniso = rotation(a["along"]) @ scaling(1 / stretch, stretch) @ rotation(-a["along"])
    return aniso @ rotation(-a["turn"]) @ scaling(size, size) @ shift

"""Winograd's algorithm in float64, and how far its roundings may take a result: what the tests of conv3x3 allow."""

import math

import torch
from test_conv3x3 import textbook
from torch.nn import functional

from fastdiff.ops import _winograd


def matrices(algorithm, m=None):
    """A^T, G and B^T of F(m, 3) in float64, by Toom and Cook: B^T from the polynomials that vanish at the other points."""
    points = _winograd.POINTS[algorithm][: None if m is None else m + 1]
    m, size = len(points) - 1, len(points) + 1
    rows = []
    for skipped in (*range(len(points)), None):
        coefficients = torch.ones(1, dtype=torch.float64)
        for i, p in enumerate(points):
            if i != skipped:
                coefficients = functional.pad(coefficients, (1, 0)) - p * functional.pad(coefficients, (0, 1))
        rows.append(functional.pad(coefficients, (0, size - len(coefficients))))
    scale = [1 / math.prod(p - q for q in points if q != p) for p in points]
    at = [[s * p**k for p, s in zip(points, scale, strict=True)] + [float(k == m - 1)] for k in range(m)]
    return torch.tensor(at, dtype=torch.float64), _winograd.at_points(points), torch.stack(rows)


def tiles_of(algorithm, size):
    """The sizes of a side's tiles: of winograd6 sixes, then fours, with the fewest points, of those the fewest sixes."""
    if algorithm != "winograd6":
        m = len(_winograd.POINTS[algorithm]) - 1
        return [m] * -(-size // m)
    choices = [[6] * sixes + [4] * max(0, -(-(size - 6 * sixes) // 4)) for sixes in range(-(-size // 6) + 1)]
    return min(choices, key=lambda tiles: (sum(tiles) + 2 * len(tiles), tiles.count(6)))


def _starts(tiles, m, length):
    """[tiles of size m, length]: where each has its first, second, ... pixel."""
    starts = [sum(tiles[:i]) for i, size in enumerate(tiles) if size == m]
    return torch.tensor(starts)[:, None] + torch.arange(length)


def by_tiles(h, weight, algorithm, squared=False):
    """Winograd's algorithm in float64. squared: the sum of squares of all products that make up a result."""
    n, _, height, width = h.shape
    down, across = tiles_of(algorithm, height), tiles_of(algorithm, width)
    padded = functional.pad(h.double(), (1, 1 + sum(across) - width, 1, 1 + sum(down) - height))
    y = torch.full((n, len(weight), sum(down), sum(across)), math.nan, dtype=torch.float64)
    for r in set(down):
        for c in set(across):
            at_r, g_r, bt_r = matrices(algorithm, r)
            at_c, g_c, bt_c = matrices(algorithm, c)
            rows, columns = _starts(down, r, r + 2)[:, None, :, None], _starts(across, c, c + 2)[:, None]
            v, u = bt_r @ padded[:, :, rows, columns] @ bt_c.T, g_r @ weight.double() @ g_c.T
            if squared:
                v, u, at_r, at_c = (t.square() for t in (v, u, at_r, at_c))
            made = at_r @ torch.einsum("nirsuv,oiuv->norsuv", v, u) @ at_c.T
            y[:, :, _starts(down, r, r)[:, None, :, None], _starts(across, c, c)[:, None]] = made
    return y[..., :height, :width]


def integer_deviation(h, weight):
    """winograd4_int16: the standard deviation of results whose operands are rounded to integers, one as if by itself.

    A value that is rounded to a unit is off by unit / sqrt(12). Units, times a channel's factor: those of _winograd.py for
    weights, a 16,380th of the largest value of 64 channels for a tile's row of points.
    """
    at, g, bt = matrices("winograd4_int16")
    even = torch.tensor(_winograd.EVEN, dtype=torch.float64)
    at, g = at / even, even[:, None] * g
    factors = _winograd._factors(weight)[:, None, None]
    padded = functional.pad(h.double(), (1, 1 + -h.shape[3] % 4, 1, 1 + -h.shape[2] % 4))
    u, v = (
        g @ (weight.double() / factors) @ g.T,
        bt @ (padded.unfold(2, 6, 4).unfold(3, 6, 4) * factors[:, None, None]) @ bt.T,
    )
    of_u = _winograd._unit(u.flatten(2).permute(2, 1, 0))[:, None, None, None] / 12**0.5
    chunks = functional.pad(v.abs().amax(-1), (0, 0, 0, 0, 0, 0, 0, -v.shape[1] % 64)).unflatten(1, (-1, 64)).amax(2)
    of_v = chunks.repeat_interleave(64, 1)[:, : v.shape[1], ..., None] / 16380 / 12**0.5
    sums = "nirsuv,oiuv->norsuv"
    variance = torch.einsum(sums, v.square(), torch.ones_like(u) * of_u.square()) + torch.einsum(
        sums, (torch.ones_like(v) * of_v).square(), u.square()
    )
    return (at.square() @ variance @ at.square().T).max().sqrt().item()


def hidden(x, norm):
    """What is convolved."""
    identity = torch.zeros(x.shape[1], x.shape[1], 3, 3, dtype=x.dtype)
    identity[:, :, 1, 1] = torch.eye(x.shape[1])
    return x if norm is None else textbook(x, identity, norm=norm)[0]


def tolerance(algorithm, dtype, h, weight, out_scale, largest):
    """Six standard deviations of the roundings of operands, taken as independent, and the rounding of the result.

    winograd2 rounds both operands of every product to bfloat16. winograd4's float32 operands come from up to four
    operations each, and a sum of I products rounds as often again as its partial sums are large: sqrt(I) / 2 on average.
    winograd6: as winograd4 on 32 channels at a time, then on these sums. winograd4_int16: its own roundings to integers, and
    before and after them as winograd4.
    """
    terms = weight.shape[1]
    if algorithm == "winograd6":
        terms = min(terms, 32) + terms / 32
    deviation = by_tiles(h, weight, algorithm, squared=True).sqrt().max().item()
    integers = 6 * integer_deviation(h, weight) * abs(out_scale) if algorithm == "winograd4_int16" else 0
    if algorithm == "winograd2":
        unit = torch.finfo(torch.bfloat16).eps / 2 * (2 / 3) ** 0.5
    else:
        unit = torch.finfo(torch.float32).eps / 2 * (8 + terms / 4) ** 0.5
    return (
        integers
        + 6 * deviation * unit * abs(out_scale)
        + largest * (torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps)
    )

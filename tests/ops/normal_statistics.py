"""Sums over a stream of values that ought to be independent standard normals, and how far they are from that."""

import math

import torch

MOMENTS = (0, 1, 0, 3, 0, 15)
VARIANCES = (1, 2, 15, 96, 945, 10170)  # of z^k: E z^2k - (E z^k)^2
LAGS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 48, 64)  # neighbours within two blocks, and strides of four blocks
REACH, BINS = 8.0, 4096  # bins of 1/256
TAILS = (3.0, 4.0, 5.0)


class Tally:
    """Streaming sums; add() takes [rows, n] of neighbouring seeds, and the draw before of the same seeds or None."""

    def __init__(self):
        self.count, self.largest = 0, 0.0
        self.powers = torch.zeros(6, dtype=torch.float64)
        self.lagged = torch.zeros(len(LAGS), 3, dtype=torch.float64)  # sums of z z', of (z^2-1)(z'^2-1); how many
        self.across = torch.zeros(2, 2, dtype=torch.float64)  # seeds, draws: sum of z z'; how many
        self.bins = torch.zeros(BINS, dtype=torch.int64)

    def add(self, z: torch.Tensor, before: torch.Tensor | None = None) -> None:
        z = z.double()
        self.count += z.numel()
        self.largest = max(self.largest, z.abs().max().item())
        z2 = z * z
        z3 = z2 * z
        flat, squares, cubes = z.flatten(), z2.flatten(), z3.flatten()
        sums = flat.sum(), squares.sum(), cubes.sum(), squares.dot(squares), squares.dot(cubes), cubes.dot(cubes)
        self.powers += torch.stack(sums)
        index = ((flat + REACH) * (BINS / (2 * REACH))).to(torch.int64)
        self.bins += torch.bincount(index, minlength=BINS)
        centred = z2 - 1
        for row, squared in zip(z, centred, strict=True):
            for i, lag in enumerate(LAGS):
                terms = row[:-lag].dot(row[lag:]), squared[:-lag].dot(squared[lag:])
                self.lagged[i] += torch.stack((*terms, torch.tensor(float(len(row) - lag))))
        self.across[0] += torch.tensor([z[:-1].flatten().dot(z[1:].flatten()), z[1:].numel()], dtype=torch.float64)
        if before is not None:
            self.across[1] += torch.tensor([before.double().flatten().dot(flat), z.numel()], dtype=torch.float64)

    def scores(self) -> dict[str, float]:
        """Each statistic's distance from its expectation in standard errors."""
        n, found = self.count, {}
        for k, (total, moment, variance) in enumerate(zip(self.powers.tolist(), MOMENTS, VARIANCES, strict=True), 1):
            found[f"moment {k}"] = (total / n - moment) / math.sqrt(variance / n)
        for lag, (product, squares, terms) in zip(LAGS, self.lagged.tolist(), strict=True):
            found[f"lag {lag}"] = product / math.sqrt(terms)
            found[f"squares, lag {lag}"] = squares / math.sqrt(4 * terms)  # Var z^2 = 2
        for name, (product, terms) in zip(("neighbouring seeds", "neighbouring draws"), self.across.tolist(), strict=True):
            found[name] = product / math.sqrt(terms) if terms else 0.0
        edges = torch.linspace(-REACH, REACH, BINS + 1, dtype=torch.float64)
        for tail in TAILS:
            p, seen = math.erfc(tail / math.sqrt(2)), self.bins[(edges[1:] <= -tail) | (edges[:-1] >= tail)].sum().item()
            found[f"tail {tail}"] = (seen - n * p) / math.sqrt(n * p * (1 - p))
        p = torch.special.ndtr(edges).diff()
        full = n * p >= 25  # where a count is near enough to normal for the sum of its squares
        chi = ((self.bins - n * p)[full] ** 2 / (n * p)[full]).sum().item()
        found["chi-squared"] = (chi - int(full.sum())) / math.sqrt(2 * int(full.sum()))
        return found

    def kolmogorov(self) -> float:
        """sqrt(n) sup |F_n - F| over the bins' edges; beyond x with probability 2 exp(-2 x^2)."""
        edges = torch.linspace(-REACH, REACH, BINS + 1, dtype=torch.float64)[1:]
        empirical = self.bins.cumsum(0).double() / self.count
        return (empirical - torch.special.ndtr(edges)).abs().max().item() * math.sqrt(self.count)

"""Are they normal, and independent? 10^8 values of the C++ kernel, 10^6 of the reference, each statistic within 5 sigma.

The values are fixed by the seeds, so a test that passes once passes always; 5 sigma (one in 1.7 million, for each of some
forty statistics) says that passing was no luck and that failing would not be.
"""

import math

import pytest
import torch
from normal_statistics import Tally

from fastdiff.ops import seed_tensor
from fastdiff.ops.philox_normal import box_muller, normal_float32, philox_words

LARGEST = float.fromhex("0x1.b0e08ep+2")  # sqrt(66 ln 2), rounded: the radius of u = 2^-33
# Seed and block (draw 0, domain 0) whose words make a radius of a 0: the first of a search through 16 blocks of every seed.
LARGEST_RADII = ((62408197, 2), (155288883, 6), (190466559, 11))


def tally(make, groups, draws, rows, size):
    """`groups` of `rows` neighbouring seeds, `draws` draws of each."""
    total = Tally()
    for group in range(groups):
        seeds, before = seed_tensor(range(group * rows, (group + 1) * rows)), None
        for draw in range(draws):
            z = make(seeds, draw, size)
            total.add(z, before)
            before = z
    return total


def check(total, expected_count):
    assert total.count >= expected_count
    scores = total.scores()
    assert all(math.isfinite(score) and abs(score) < 5 for score in scores.values()), scores
    assert total.kolmogorov() < 2.75, "Kolmogorov-Smirnov, at the significance of 5 sigma"
    assert total.largest <= LARGEST


def native(seeds, draw, size):
    return torch.ops.fastdiff.philox_normal(seeds, draw, 0, (size,), torch.float32)


def test_reference():
    check(tally(lambda seeds, draw, size: normal_float32(seeds, draw, 0, (size,)), 2, 2, 8, 2**15), 10**6)


def test_ten_to_the_eighth():
    total = tally(native, 12, 8, 8, 2**17)
    check(total, 10**8)
    assert total.largest > 5.2, "one of 10^8 is beyond 5.2 with probability 1 - 10^-8"


def test_kolmogorov_without_bins():
    """The exact distance, from 10^7 sorted values of a thousand samples."""
    z = native(seed_tensor(range(2**64 - 1000, 2**64)), 3, 10_000).flatten().sort().values.double()
    cdf, n = torch.special.ndtr(z), z.numel()
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps - cdf).abs(), (cdf - steps + 1 / n).abs()).max().item()
    assert distance * math.sqrt(n) < 2.75


@pytest.mark.parametrize(
    "spoil",
    [
        lambda z: z * 1.003,
        lambda z: z + 5e-3,
        lambda z: z + 0.01 * z.roll(1, -1),
        lambda z: z + 0.01 * z.roll(1, 0),
        lambda z: z.clamp(-3.5, 3.5),
        lambda z: (z * 32).round() / 32,
        lambda z: torch.where(z.roll(1, -1).abs() > 2, z * 1.1, z),
    ],
    ids=["scale", "shift", "neighbours", "seeds", "clipped", "coarse", "squares"],
)
def test_the_tests_have_power(spoil):
    """Small faults are found in 2^22 values."""
    total = tally(lambda *args: spoil(native(*args)), 2, 2, 8, 2**17)
    worst = max(abs(score) for score in total.scores().values())
    assert worst > 6 or total.kolmogorov() > 3


def test_the_largest_value_is_reached():
    """Word 0 gives it: on the reference directly, and where a counter was found, through each instruction set."""
    z = torch.stack(box_muller(torch.zeros(4, dtype=torch.int64), torch.arange(4) << 30))
    assert z.abs().amax(0).tolist() == [LARGEST] * 4 and set(z.flatten().tolist()) == {LARGEST, -LARGEST, 0.0}


@pytest.mark.parametrize("seed, block", LARGEST_RADII)
def test_the_largest_radius_is_reached(isa, seed, block):
    words = [int(w) for w in philox_words(seed_tensor([seed]), torch.tensor([block]), 0, 0)]
    z = native(seed_tensor([seed]), 0, 4 * block + 4)[0, -4:]
    pair = z[:2] if words[0] == 0 else z[2:]
    assert 0 in (words[0], words[2]) and abs(float(pair.double().norm()) - LARGEST) < 2**-21
    assert torch.equal(z, normal_float32(seed_tensor([seed]), 0, 0, (4 * block + 4,))[0, -4:])

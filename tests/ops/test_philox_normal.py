"""philox_normal: published vectors, bits, independence of batch and threads. test_philox_statistics.py: the distribution."""

import math
import sys

import pytest
import torch

from fastdiff.ops import Domain, philox_normal, seed_tensor

module = sys.modules["fastdiff.ops.philox_normal"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Random123's kat_vectors for philox4x32-10: counter, key, result.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("counter, key, expected", PUBLISHED)
def test_published_vectors(counter, key, expected):
    seed, block = seed_tensor([key[1] << 32 | key[0]]), seed_tensor([counter[1] << 32 | counter[0]])
    words = module.philox_words(seed, block, counter[2], counter[3])
    assert tuple(int(w) for w in words) == expected


def test_box_muller_at_the_edges_of_its_words():
    # Smallest and largest u, both sides of every octant boundary of the angle and of the log's range reduction.
    w0 = torch.tensor([0, 1, 127, 128, 2**31, 3037000499, 3037000500, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    w1 = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30 - 1, 3 * 2**30, 2**32 - 1])
    w0, w1 = (w.flatten() for w in torch.meshgrid(w0, w1, indexing="ij"))
    z = torch.stack(module.box_muller(w0, w1)).double()
    u = w0.double() * 2.0**-32 + 2.0**-33
    quarter = w1 & (2**30 - 1)
    signed = torch.where(quarter >= 2**29, quarter - 2**30, quarter).double() * 2.0**-30
    angle = (math.pi / 2) * ((w1 >> 30).double() + signed)
    r = (-2 * u.log()).sqrt()
    truth = torch.stack((r * angle.cos(), r * angle.sin()))
    assert z.isfinite().all() and z.abs().max() < 6.8
    # u rounded to float32 moves r by d(r^2)/2r: near u = 1, where r is small, sqrt(2^-24) = 2.4e-4 at most.
    assert (z - truth).abs().max() < 3.5e-4 and (z - truth)[:, u < 0.9].abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_equal_the_reference(isa, dtype):
    seeds = seed_tensor([0, 2**64 - 1, 2**63, 123456789012345678])
    # A whole number of vectors, one that is not, single elements, nothing, and more than one task per thread.
    for shape in [(2**18 if dtype == torch.float32 else 2**14,), (3, 37, 41), (1,), (5,), (), (0,), (2, 0, 3)]:
        for draw, domain in ((0, Domain.INITIAL), (2**32 - 1, Domain.AUGMENT)):
            got = torch.ops.fastdiff.philox_normal(seeds, draw, domain, shape, dtype)
            assert same_bits(got, module.reference(seeds, draw, domain, shape, dtype)), (shape, draw, domain)


# Seed and block, found by searching 2^30 values: two with a pair at u = 1 (r = 0), and one with |z| = 6.34.
RARE_BLOCKS = ((72, 195886), (94, 227901), (5006, 255903))


def test_bits_where_the_radius_is_extreme(isa):
    for seed, block in RARE_BLOCKS:
        w = module.philox_words(seed_tensor([seed]), torch.tensor([block]), 0, 0)
        expected = torch.cat([torch.stack(module.box_muller(*w[i : i + 2]), -1).flatten() for i in (0, 2)])
        got = torch.ops.fastdiff.philox_normal(seed_tensor([seed]), 0, 0, (4 * block + 4,), torch.float32)[0, -4:]
        assert same_bits(got, expected), (seed, block)
        assert got.eq(0).any() or got.abs().max() > 6.3, "the search found something rare here"


def test_noise_belongs_to_the_sample():
    seeds = list(range(40, 49))
    whole = philox_normal(seed_tensor(seeds), 7, (3, 5, 7))
    parts = [philox_normal(seed_tensor(s), 7, (3, 5, 7)) for s in (seeds[:1], seeds[1:4], seeds[4:])]
    assert same_bits(whole, torch.cat(parts))
    assert same_bits(philox_normal(seed_tensor([44]), 7, (3, 5, 7))[0], whole[4])
    longer = philox_normal(seed_tensor(seeds), 7, (1000,))
    assert same_bits(longer[:, :105], whole.flatten(1)), "the first elements do not depend on how many there are"


def test_threads_do_not_change_bits():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(philox_normal(seed_tensor(range(3)), 0, (50001,)))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_streams_are_unrelated():
    n = 2**18
    streams = [philox_normal(seed_tensor([s]), d, (n,), domain=m)[0] for s in (0, 1) for d in (0, 1) for m in (0, 1)]
    correlation = torch.corrcoef(torch.stack(streams).double()) - torch.eye(len(streams))
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.fastdiff.philox_normal.default, (seed_tensor([1, 2]), 3, 1, [3, 5], dtype))


def test_compiles_as_one_graph():
    def noise(seeds):
        return philox_normal(seeds, 5, (3, 9, 11)) * 2

    seeds = seed_tensor([3, 4])
    assert same_bits(torch.compile(noise, fullgraph=True)(seeds), noise(seeds))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: philox_normal(seed_tensor([1]), 0, (2,), law="cauchy"), "law: 'cauchy'"),
        (lambda: philox_normal(seed_tensor([1]), -1, (2,)), "draw: -1"),
        (lambda: philox_normal(seed_tensor([1]), 2**32, (2,)), "draw: 4294967296"),
        (lambda: philox_normal(torch.ones(2), 0, (2,)), "seeds: expected int64"),
        (lambda: philox_normal(seed_tensor([1]), 0, (2,), dtype=torch.int32), "dtype: torch.int32"),
        (lambda: seed_tensor([2**64]), "seeds: 18446744073709551616 is out of range"),
        (lambda: seed_tensor([-1]), "seeds: -1 is out of range"),
        (lambda: seed_tensor([0.5]), "seeds: 0.5 is no integer"),
        (lambda: seed_tensor([True]), "seeds: True is no integer"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()

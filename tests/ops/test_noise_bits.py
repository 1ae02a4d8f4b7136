"""One sample's noise has one set of bits: whatever the batch it is in, the memory format, the consumer and its type."""

import itertools

import pytest
import torch

from fastdiff.ops import Domain, add_noise, philox_normal, seed_tensor
from fastdiff.ops.philox_normal import normal_float32

SEEDS = (0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF)
SPLITS = ((5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ("contiguous", "channels_last", "rows apart", "transposed")


def lay(x, form):
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if form == "rows apart":
        return torch.cat((x, x), -1)[..., : x.shape[-1]]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if form == "transposed" else x


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def consumed(x0, seeds, draw):
    """The form (0, 1): what add_noise makes is the noise itself, plus 0 x0."""
    forms = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64).expand(len(seeds), 1, 2)
    return add_noise(x0, seeds, forms, draw)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 12), (5, 7, 9)], ids=str)
def test_batch_split_format_and_type(isa, shape, dtype):
    truth = normal_float32(seed_tensor(SEEDS), 2**31 + 7, Domain.TRAINING, shape)
    # 0 x0 + n turns -0 into +0; no other value of the noise is touched by the consumer.
    wanted = (truth + 0.0).to(dtype)
    for split, form in itertools.product(SPLITS, FORMATS):
        parts = [seed_tensor(part) for part in split_up(SEEDS, split)]
        made = torch.cat([philox_normal(p, 2**31 + 7, shape, domain=Domain.TRAINING, dtype=dtype) for p in parts])
        assert same_bits(made, truth.to(dtype)), split
        made = torch.cat([consumed(lay(torch.zeros(len(p), *shape, dtype=dtype), form), p, 2**31 + 7) for p in parts])
        assert same_bits(made, wanted), (split, form)


def split_up(values, sizes):
    ends = list(itertools.accumulate(sizes))
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("seed, block", [(62408197, 2), (155288883, 6), (190466559, 11)])
def test_the_largest_radius_is_consumed_alike(isa, seed, block):
    """Blocks whose words make the largest radius there is, as the pixels of an image."""
    x0 = torch.zeros(1, 1, 4, block + 1)
    truth = normal_float32(seed_tensor([seed]), 0, Domain.INITIAL, x0.shape[1:])
    forms = torch.tensor([[[0.0, 1.0]]])
    made = add_noise(x0, seed_tensor([seed]), forms, 0, Domain.INITIAL)[0]
    assert same_bits(made, truth) and truth.abs().max() > 4.6

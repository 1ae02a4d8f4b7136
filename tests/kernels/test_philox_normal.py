"""The Triton philox_normal: the reference's bits."""

import importlib

import pytest
import torch

from fastdiff.ops import seed_tensor
from fastdiff.ops.philox_normal import box_muller, reference

SEEDS = (0, 1, 2**64 - 1, 2**63, 0x0123456789ABCDEF)
# One element; not a multiple of a block; a sample of several programs; 5 x 53,000 > 2^18 values, as many
# as test_add_noise compares without the slow tests.
SHAPES = ((), (1,), (5,), (3, 32, 33), pytest.param((8, 25, 265), marks=pytest.mark.slow))


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.philox_normal").philox_normal


def same_bits(a, b):
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return torch.equal(a.cpu().view(integer), b.cpu().view(integer))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(launch, device, shape):
    made = launch(seed_tensor(SEEDS, device), 7, 1, shape, torch.float32)
    assert made.is_contiguous() and same_bits(made, reference(seed_tensor(SEEDS), 7, 1, shape, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_round_once(launch, device, dtype, monkeypatch):
    monkeypatch.delenv("FASTDIFF_STRICT", raising=False)  # float64 is the reference's
    made = launch(seed_tensor(SEEDS, device), 0, 0, (3, 21, 21), dtype)
    assert same_bits(made, reference(seed_tensor(SEEDS), 0, 0, (3, 21, 21), dtype))


@pytest.mark.parametrize("split", [(1, 4), (2, 2, 1)], ids=str)
def test_batch_splits(launch, device, split):
    whole, made = reference(seed_tensor(SEEDS), 7, 1, (3, 7, 9), torch.float32), []
    for part in seed_tensor(SEEDS, device).split(split):
        made.append(launch(part, 7, 1, (3, 7, 9), torch.float32))
    assert same_bits(torch.cat(made), whole)


@pytest.mark.parametrize("seed, block", [(62408197, 2), (155288883, 6), (190466559, 11)])
def test_the_largest_radius(launch, device, seed, block):
    """Words 0, where the radius is the largest that there is."""
    made = launch(seed_tensor([seed], device), 0, 0, (4 * block + 4,), torch.float32)
    assert same_bits(made, reference(seed_tensor([seed]), 0, 0, (4 * block + 4,), torch.float32))
    assert (
        abs(max(float(pair.double().norm()) for pair in made[0, -4:].reshape(2, 2)) - float.fromhex("0x1.b0e08ep+2")) < 1e-6
    )


@pytest.mark.parametrize("draw", [2**31 - 1, 2**31, 2**32 - 1])
def test_draws_and_domains_are_words(launch, device, draw):
    made = launch(seed_tensor([3], device), draw, 3, (9,), torch.float32)
    assert same_bits(made, reference(seed_tensor([3]), draw, 3, (9,), torch.float32))


def test_empty(launch, device):
    assert launch(seed_tensor([], device), 0, 0, (3, 4), torch.float32).shape == (0, 3, 4)
    assert launch(seed_tensor([1], device), 0, 0, (0, 4), torch.float32).shape == (1, 0, 4)


def test_strict_refuses_float64(launch, device, monkeypatch):
    monkeypatch.setenv("FASTDIFF_STRICT", "1")
    with pytest.raises(RuntimeError, match="float64"):
        launch(seed_tensor([1], device), 0, 0, (4,), torch.float64)


def test_box_muller_at_the_edges(device):
    """Words that random data all but never has: radius 0 and -0, both ends of every quadrant, rounding up to a power."""
    triton = pytest.importorskip("triton")
    words = [0, 1, 2**24 + 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 2**29, 3 * 2**30]
    words += [2**32 - 129, 2**32 - 128, 2**32 - 1]
    a, b = (t.flatten() for t in torch.meshgrid(torch.tensor(words), torch.tensor(words), indexing="ij"))
    size = triton.next_power_of_2(len(a))
    pad = torch.zeros(size - len(a), dtype=torch.int64)
    signed = [torch.cat((w, pad)).to(torch.int32).to(device) for w in (a, b)]
    out = torch.empty(2, size, device=device)
    pairs = importlib.import_module("edge_kernel").pairs
    pairs[(1,)](*signed, out, size, enable_fp_fusion=False)
    want = torch.stack(box_muller(a, b))
    assert same_bits(out[:, : len(a)].contiguous(), want)

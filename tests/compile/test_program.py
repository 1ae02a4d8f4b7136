"""A program is its network: to rounding in value, to the bit in every batch."""

import copy
import threading
import warnings

import pytest
import torch
from compiled_networks import NETWORKS, inputs
from tiny import awake

from fastdiff import ops
from fastdiff.compile import program as flat
from fastdiff.compile import program_of
from fastdiff.compile.choose import CANDIDATES
from fastdiff.compile.conditions import Conditions
from fastdiff.compile.program import LIBRARY
from fastdiff.compile.steps import Attention, Conv3x3, Normalise

LOSSLESS = 2e-5  # of quality="lossless", relative to the output's norm


def choices(network, algorithm):
    """Every convolution by this algorithm."""
    return {f"{name}": algorithm for name, _ in network.named_modules()}


def algorithms(dtype):
    return [LIBRARY, *(a for a in CANDIDATES[dtype] if a in ops.conv3x3_algorithms(dtype))]


def error(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("algorithm", algorithms(torch.float32))
def test_lossless(network, algorithm):
    """float32: within 2e-5 of the network in float64, and within the network's own rounding where nothing is transformed."""
    program = program_of(network, torch.float32, choices=choices(network, algorithm))
    assert set(program.algorithms.values()) <= {algorithm, LIBRARY}
    given = inputs(network.config)
    with torch.inference_mode():
        x, t, labels = given
        truth = copy.deepcopy(network).double()(x.double(), t.double(), labels)
        plain, got = network(*given), program(*given)
    assert got.dtype == torch.float32 and got.shape == plain.shape
    assert error(got, truth) <= LOSSLESS
    if algorithm == LIBRARY:
        assert error(got, truth) <= 2 * error(plain, truth) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("algorithm", algorithms(torch.bfloat16))
def test_high(network, algorithm):
    """bfloat16: at most twice the error of the network under autocast."""
    program = program_of(network, torch.bfloat16, choices=choices(network, algorithm))
    given = inputs(network.config)
    with torch.inference_mode():
        x, t, labels = given
        truth = copy.deepcopy(network).double()(x.double(), t.double(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            plain = network(*given)
        got = program(*given)
    assert got.dtype == torch.float32
    # one unit in the last place: a small network's error is a matter of luck
    assert error(got, truth) <= 2 * error(plain, truth) + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(network, dtype):
    """Every algorithm keeps the order of summation, for images alone, together and in either memory format."""
    for algorithm in algorithms(dtype):
        program = program_of(network, dtype, choices=choices(network, algorithm))
        x, t, labels = inputs(network.config, 5)
        t[1:3] = t[0]
        whole = program(x, t, labels)
        for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
            some = None if labels is None else labels[part]
            assert torch.equal(program(x[part], t[part], some), whole[part]), (algorithm, part)
        assert torch.equal(program(x.contiguous(memory_format=torch.channels_last), t, labels), whole)
        assert torch.equal(program(x, t, labels), whole)
        program.together = 1
        assert torch.equal(program(x, t, labels), whole)


def test_how_many_images_go_together(monkeypatch):
    """As many as fit a cache where weights are few; all of them where weights would be read again for each part."""
    network = awake(NETWORKS["ddpm"])
    program = program_of(network, torch.float32, choices=choices(network, LIBRARY))
    assert program.together == flat.TOGETHER // (4 * 48 * 8 * 8), "32 channels from below and 16 that join them"
    sizes, run = [], program._run
    monkeypatch.setattr(program, "_run", lambda x, c: (sizes.append({len(x), *map(len, c)}), run(x, c))[1])
    monkeypatch.setattr(program, "together", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, t, _ = inputs(network.config, 5)
    assert program(x, t).shape == x.shape and sizes == [{4}, {1}]
    monkeypatch.setattr(flat, "LIGHT", sum(p.numel() for p in network.parameters()) - 1)
    assert program_of(network, torch.float32, choices=choices(network, LIBRARY)).together is None


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (4, 12)])
def test_other_sizes(size):
    """A program serves every size that its network does."""
    network = awake(NETWORKS["ddpmpp"])
    program = program_of(network, torch.float32)
    given = inputs(network.config, 2, size)
    with warnings.catch_warnings(record=True) as said, torch.inference_mode():
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(program(*given), network(*given), rtol=0, atol=1e-5)
    expected = (
        f"x: {size[0]} x {size[1]} is computed by the algorithms that are fastest at 8 x 8; fastdiff.compile(model, size="
    )
    assert [str(w.message).startswith(expected) for w in said] == ([] if size == (8, 8) else [True])
    with pytest.raises(ValueError, match="x: 6 x 7 cannot be halved to the last level; use multiples of 2"):
        program(torch.zeros(1, 3, 6, 7), torch.zeros(1))


def test_labels_and_augmentation():
    """One-hot labels, augmentation labels and labels left out, as the network takes them."""
    network = awake(NETWORKS["ncsnpp"])
    program = program_of(network, torch.float32)
    x, t, labels = inputs(network.config)
    hot = torch.nn.functional.one_hot(labels, 3).float()
    with torch.inference_mode():
        for given in ((labels, torch.randn(3, 2)), (hot, None), (hot, torch.randn(3, 2))):
            torch.testing.assert_close(program(x, t, *given), network(x, t, *given), rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="labels: this network is class-conditional; pass int64"):
            program(x, t)


def test_what_is_folded():
    """DDPM++: nothing is left of norms, sums, scales and embeddings but the convolutions that took them in."""
    network = awake(NETWORKS["ddpmpp"])
    program = program_of(network, torch.float32)
    steps = program.convolutions
    assert len(steps) == sum(m.kernel_size == (3, 3) for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    inner = [s for s in steps if s.name.endswith("conv1")]
    assert inner and all(s.residual is not None and s.norm is not None and s.out_scale == 0.5**0.5 for s in inner)
    assert all(s.add is not None for s in steps if s.name.endswith("conv0"))
    assert all(s.norm.stats is not None for s in inner), "statistics of the first convolution"
    assert any(s.norm.stats is not None for s in program.steps if isinstance(s, Attention))
    assert sum(isinstance(s, Normalise) for s in program.steps) == 1, "only halving blocks normalise by themselves"


def test_nothing_is_kept_alive():
    """Each value is dropped after the step that reads it last, and never before."""
    program = program_of(awake(NETWORKS["ddpm"]), torch.float32)
    gone: set[int] = set()
    for step, unused in zip(program.steps, program.unused, strict=True):
        assert not gone & {i for i in step.reads if i is not None}
        gone |= set(unused)
    read = {i for step in program.steps for i in step.reads if i is not None}
    assert gone == read - {program.output}


def test_embeddings_are_tabulated():
    """A plan's times are computed once, at compile time where they are given; the table does not grow without bound."""
    network = awake(NETWORKS["ddpm"])
    program = program_of(network, torch.float32)
    program.tabulate([0.25, 0.5])
    assert program.conditions.times() == [0.25, 0.5]
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = network(x, torch.full((2,), 0.25))
    program.conditions.network = None  # nothing more is computed
    torch.testing.assert_close(program(x, torch.full((2,), 0.25)), expected, rtol=0, atol=1e-5)
    assert torch.equal(program(x, torch.tensor([0.25]).expand(2)), program(x, torch.full((2,), 0.25)))


def test_the_table_is_bounded():
    network = awake(NETWORKS["adm"])
    conditions = Conditions(network, program_of(network, torch.float32).conditions.layers)
    conditions.limit = 4
    with torch.inference_mode():
        for first in range(0, 12, 3):
            t = torch.arange(first, first + 3) / 10.0
            rows = conditions(t, torch.tensor([0, 1, 2]), None)
            direct = conditions._together(t, torch.tensor([0, 1, 2]), None)
            for a, b in zip(rows, direct, strict=True):  # GPUs' one product of all blocks
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert len(conditions.known) <= 4
    assert list(conditions.known) == [(t, c) for t, c in conditions.known if t >= 0.8]


def test_threads():
    """Two at once compute what one does."""
    network = awake(NETWORKS["adm"])
    program = program_of(network, torch.float32)
    given = [(torch.randn(2, 3, 8, 8), torch.tensor([0.1 * i, 0.3]), torch.tensor([i % 3, 1])) for i in range(8)]
    expected = [program(*g) for g in given]
    program.conditions.known.clear()
    found: list = [None] * len(given)

    def work(first):
        for i in range(first, len(given), 2):
            found[i] = program(*given[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_of_another_packing_are_refused():
    network = awake(NETWORKS["ddpm"])
    for algorithm in algorithms(torch.float32)[1:]:
        program = program_of(network, torch.float32, choices=choices(network, algorithm))
        packed = {
            s.name: s.packed[..., :-1] for s in program.convolutions if isinstance(s, Conv3x3) and s.packed is not None
        }
        with pytest.raises(ValueError, match=r"packed weights of .*: torch\.float32"):
            program_of(network, torch.float32, choices=choices(network, algorithm), packed=packed)

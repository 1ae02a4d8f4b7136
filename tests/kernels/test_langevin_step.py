"""The Triton langevin_step against the reference: layouts, modes, many tiles, and the noise's bits."""

import importlib

import pytest
import torch
from kernel_checks import LAYOUTS, check, lay

from fastdiff.ops import seed_tensor
from fastdiff.ops.langevin_step import Norms, reference
from fastdiff.ops.philox_normal import Domain, normal_float32

SEEDS = (0, 2**64 - 1, 5)
SHAPES = ((3, 6, 12, 20), (3, 3, 5, 5), (3, 37, 2, 2), (3, 1, 1, 1), (3, 8))


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.langevin_step").langevin_step


def tables():
    coefficients = torch.tensor([[-0.3, 0.8, 0.05, 0.9, 0.0], [0.0, -3.0, 0.0512, 0.4, 0.0]])
    return coefficients, torch.tensor([7, -1], dtype=torch.int32)


def inputs(shape, layout, net_layout, dtype, has_mean=True):
    torch.manual_seed(0)
    x, mean = (lay(torch.randn(shape), layout) for _ in range(2))
    F, net_in = (lay(torch.randn(shape), net_layout).to(dtype) for _ in range(2))
    return [x, F, net_in, mean if has_mean else None]


def keep(t, device):
    """A copy on the device with the same strides, gaps included."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def compare(launch, device, tensors, norms, row=(0,), seeds=SEEDS):
    def run(step, to):
        moved = [None if t is None else to(t) for t in (*tensors, tables()[0])]
        rest = [v.to(moved[0].device) for v in (tables()[1], torch.tensor(row))]
        step(*moved[:-1], seed_tensor(seeds, moved[0].device), moved[-1], *rest, int(norms))
        return [None if t is None else t.cpu() for t in moved[:-1]]

    ours, plain = run(launch, lambda t: keep(t, device)), run(reference, lambda t: keep(t, "cpu"))
    truth = run(reference, lambda t: t.double())
    for name, a, p, t in zip(("x", "F", "net_in", "mean"), ours, plain, truth, strict=True):
        if a is not None and a.numel():
            check(name, a, p, t, sums=8)
    return ours


@pytest.mark.parametrize("net_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_layouts(launch, device, shape, layout, net_layout):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[LAYOUTS.index(net_layout)]
    compare(launch, device, inputs(shape, layout, net_layout, dtype), Norms.SAMPLE, (1,))


@pytest.mark.parametrize("norms", list(Norms), ids=lambda n: n.name)
@pytest.mark.parametrize("row", [(1,), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modes(launch, device, shape, row, norms):
    layouts = ("contiguous",) * 2 if len(shape) == 2 else ("contiguous", "channels_last")
    compare(launch, device, inputs(shape, *layouts, torch.bfloat16, has_mean=len(shape) == 4), norms, row)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_tiles_than_partial_sums(launch, device, layout, monkeypatch):
    """Programs that sum several tiles, the last of them fewer."""
    module = importlib.import_module("fastdiff.kernels.langevin_step")
    monkeypatch.setattr(module, "PARTS", 4)
    for norms in (Norms.SAMPLE, Norms.BATCH):
        compare(launch, device, inputs((3, 5, 32, 36), layout, layout, torch.float32), norms)


def test_a_batch_larger_than_the_folding_block(launch, device):
    tensors = inputs((70, 1, 2, 4), "contiguous", "contiguous", torch.float32)
    compare(launch, device, tensors, Norms.BATCH, seeds=range(70))


def test_a_sample_does_not_depend_on_the_batch(launch, device):
    tensors = inputs((3, 6, 12, 20), "contiguous", "contiguous", torch.float32)
    whole = compare(launch, device, tensors, Norms.SAMPLE)
    alone = compare(launch, device, [t[1:2].contiguous() for t in tensors], Norms.SAMPLE, seeds=SEEDS[1:2])
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_no_score_no_step_and_nan_is_seen(launch, device):
    tensors = inputs((3, 6, 12, 20), "contiguous", "contiguous", torch.float32)
    tensors[0][0], tensors[1][0] = 0, 0
    tensors[1][1, 2, 3, 4] = float("nan")
    x, F, net_in, mean = (t.to(device) for t in tensors)
    coefficients, draws = (t.to(device) for t in tables())
    row = torch.zeros(1, dtype=torch.int64, device=device)
    launch(x, F, net_in, mean, seed_tensor(SEEDS, device), coefficients, draws, row, int(Norms.SAMPLE))
    assert not x[0].any() and not mean[0].any() and x[1].isnan().all() and x[2].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_bits(launch, device, layout):
    """x = 0, score = 0 x + 0 F, eps given as 1/2: x' is nothing but z."""
    x, F, net_in, mean = (t.to(device) for t in inputs((3, 32, 12, 20), layout, layout, torch.float32))
    x.zero_()
    coefficients = torch.tensor([[0.0, 0.0, 0.5, 1.0, 0.0]], device=device)
    draws, row = (
        torch.tensor([2**31 - 1], dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    launch(x, F, net_in, mean, seed_tensor(SEEDS, device), coefficients, draws, row, int(Norms.GIVEN))
    assert torch.equal(x.cpu(), normal_float32(seed_tensor(SEEDS), 2**31 - 1, Domain.STEP, x.shape[1:]))
    assert torch.equal(net_in, x) and not mean.any()


def test_empty(launch, device):
    tensors = [t.to(device) for t in inputs((0, 3, 4, 4), "contiguous", "contiguous", torch.float32)]
    coefficients, draws = (t.to(device) for t in tables())
    row = torch.zeros(1, dtype=torch.int64, device=device)
    launch(*tensors, seed_tensor([], device), coefficients, draws, row, int(Norms.BATCH))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("norms", list(Norms), ids=lambda n: n.name)
def test_one_graph_serves_every_row(launch, norms):
    tensors = [t.cuda() for t in inputs((3, 6, 12, 20), "contiguous", "channels_last", torch.bfloat16)]
    coefficients, draws = (t.cuda() for t in tables())
    seeds, row = seed_tensor(SEEDS, "cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    eager = [t.clone() for t in tensors]
    launch(*[t.clone() for t in tensors], seeds, coefficients, draws, row, int(norms))  # compiles
    before = [t.clone() for t in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(*tensors, seeds, coefficients, draws, row, int(norms))
    for t, start in zip(tensors, before, strict=True):
        t.copy_(start)
    for r in range(2):
        row.fill_(r)
        graph.replay()
        launch(*eager, seeds, coefficients, draws, row, int(norms))
    for a, b in zip(tensors, eager, strict=True):
        assert torch.equal(a, b)

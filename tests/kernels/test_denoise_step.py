"""The Triton denoise_step against the reference: every kind of row, every mix of layouts, nothing read that is not used."""

import importlib

import pytest
import torch
from kernel_checks import LAYOUTS, check, lay

from fastdiff.ops import seed_tensor
from fastdiff.ops.denoise_step import C, K, reference
from fastdiff.ops.philox_normal import Domain, normal_float32

SEEDS = (0, 2**64 - 1, 5)
SHAPES = ((3, 6, 12, 20), (3, 3, 5, 5), (3, 37, 2, 2), (3, 1, 1, 1))
ROWS = 5


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.denoise_step").denoise_step


def tables():
    """Rows: two noises, saves x; one, saves D; none, saves nothing; the second only, saves Dc; a slot out of range."""
    torch.manual_seed(1)
    coefficients = torch.randn(ROWS, len(C))
    coefficients[1:3, C.N2] = 0
    coefficients[2:4, C.N1] = 0
    codes = torch.zeros(ROWS, len(K), dtype=torch.int32)
    codes[:, K.DRAW1], codes[:, K.DRAW2] = torch.arange(ROWS), 100 + torch.arange(ROWS)
    codes[:, K.SAVE_X] = torch.tensor([1, 0, 0, 1, 0])
    codes[:, K.SAVE_D] = torch.tensor([-1, 1, -1, 0, 9])
    codes[:, K.SAVE_CLIPPED] = torch.tensor([0, 0, 0, 1, 0])
    return coefficients, codes


def inputs(shape, layout, net_layout, dtype, slots=2, has_F=True, has_saved=True):
    x, saved = (lay(torch.randn(shape), layout) for _ in range(2))
    history = lay(torch.randn(slots, *shape), layout)
    F, net_in = lay(2 * torch.randn(shape), net_layout).to(dtype), lay(torch.zeros(shape), net_layout).to(dtype)
    return [x, F if has_F else None, saved if has_saved else torch.empty(0), history, net_in]


def compare(launch, device, tensors, row, coefficients, codes):
    def run(step, to):
        moved = [None if t is None else to(t) for t in (*tensors, coefficients)]
        step(*moved[:-1], seed_tensor(SEEDS, moved[0].device), moved[-1], codes.to(moved[0].device), row.to(moved[0].device))
        return [None if t is None else t.cpu() for t in moved[:-1]]

    ours = run(launch, lambda t: _keep(t, device))
    plain = run(reference, lambda t: _keep(t, "cpu"))
    truth = run(reference, lambda t: t.double())
    for name, a, p, t in zip(("x", "F", "saved", "history", "net_in"), ours, plain, truth, strict=True):
        if a is not None and a.numel():
            check(name, a, p, t)


def _keep(t, device):
    """A copy on the device with the same strides, gaps included."""
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return copy.copy_(t)


@pytest.mark.parametrize("net_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(launch, device, shape, layout, net_layout):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[LAYOUTS.index(net_layout)]
    compare(launch, device, inputs(shape, layout, net_layout, dtype), torch.tensor([1]), *tables())


@pytest.mark.parametrize("row", [[0], [1], [2], [3], [4], [4, 0, 3]], ids=str)
@pytest.mark.parametrize("has", [(2, True, True), (0, True, False), (2, False, True), (6, True, False)], ids=str)
def test_rows(launch, device, row, has):
    tensors = inputs((3, 2, 4, 6), "contiguous", "contiguous", torch.float32, *has)  # has: slots, F, saved
    compare(launch, device, tensors, torch.tensor(row), *tables())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_bits(launch, device, layout):
    """A row that is nothing but its first noise term; test_add_noise compares more values of the same device function."""
    x, F, saved, history, net_in = (t.to(device) for t in inputs((3, 32, 12, 20), layout, layout, torch.float32, 0))
    coefficients, codes = torch.zeros(1, len(C)), torch.tensor([[2**31 - 1, 0, 0, -1, 0]], dtype=torch.int32)
    coefficients[0, C.N1] = 1
    row = torch.zeros(1, dtype=torch.int64, device=device)
    launch(x, F, saved, history, net_in, seed_tensor(SEEDS, device), coefficients.to(device), codes.to(device), row)
    assert torch.equal(x.cpu(), normal_float32(seed_tensor(SEEDS), 2**31 - 1, Domain.STEP, x.shape[1:]))


def test_unused_buffers_are_not_read(launch, device):
    """saved and history may hold anything until a row has written them."""
    x, F, saved, history, net_in = (t.to(device) for t in inputs((3, 2, 4, 6), "contiguous", "contiguous", torch.float32))
    coefficients, codes = tables()
    coefficients[:, [C.SAVED, C.H0, C.H1, C.H2, C.H3]] = 0
    saved.fill_(float("nan"))
    history.fill_(float("nan"))
    row = torch.tensor([2], device=device)
    launch(x, F, saved, history, net_in, seed_tensor(SEEDS, device), coefficients.to(device), codes.to(device), row)
    assert x.isfinite().all() and net_in.isfinite().all()


def test_nan_passes_the_clamp(launch, device):
    x, F, saved, history, net_in = (t.to(device) for t in inputs((3, 2, 4, 6), "contiguous", "contiguous", torch.float32))
    F[0, 0, 0, 0] = float("nan")
    coefficients, codes = tables()
    row = torch.tensor([3], device=device)
    launch(x, F, saved, history, net_in, seed_tensor(SEEDS, device), coefficients.to(device), codes.to(device), row)
    assert x.isnan().sum() == 1 and history[0].isnan().sum() == 1


def test_empty(launch, device):
    tensors = [t.to(device) for t in inputs((0, 3, 4, 4), "contiguous", "contiguous", torch.float32)]
    coefficients, codes = (t.to(device) for t in tables())
    launch(*tensors, seed_tensor([], device), coefficients, codes, torch.tensor([0], device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_one_graph_serves_every_row(launch):
    tensors = [t.cuda() for t in inputs((3, 6, 12, 20), "contiguous", "channels_last", torch.bfloat16)]
    coefficients, codes = (t.cuda() for t in tables())
    seeds, row = seed_tensor(SEEDS, "cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    eager = [t.clone() for t in tensors]
    launch(*[t.clone() for t in tensors], seeds, coefficients, codes, row)  # compiles
    before = [t.clone() for t in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(*tensors, seeds, coefficients, codes, row)
    for t, start in zip(tensors, before, strict=True):
        t.copy_(start)
    for r in range(ROWS):
        row.fill_(r)
        graph.replay()
        launch(*eager, seeds, coefficients, codes, row)
    for a, b in zip(tensors, eager, strict=True):
        assert torch.equal(a, b)

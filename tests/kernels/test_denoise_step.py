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


def compare(launch, device, tensors, row, coefficients, codes, *branches):
    """branches: F_u, guidance, V."""

    def run(step, to):
        moved, table, more = ([None if t is None else to(t) for t in ts] for ts in (tensors, [coefficients], branches))
        on = moved[0].device
        step(*moved, seed_tensor(SEEDS, on), *table, codes.to(on), row.to(on), *more)
        return [None if t is None else t.cpu() for t in moved]

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


NAN = float("nan")


def halves(shape, layout, dtype, dim):
    """The two halves of one network output, whose batch (dim 0) or channels (dim 1) are doubled."""
    return lay(torch.randn([2 * n if d == dim else n for d, n in enumerate(shape)]), layout).to(dtype).chunk(2, dim)


def rows_apart():
    """Row r is sample r's: guidance off, on, a share of it; the learned deviation beside n_1, alone, off."""
    coefficients, codes = tables()
    coefficients[:3, C.GUIDE] = torch.tensor([0.0, 1.0, 0.3])
    coefficients[:3, C.N1] = torch.tensor([0.5, 0.0, 0.7])
    coefficients[:3, C.N_V] = torch.tensor([-0.4, 1.2, 0.0])
    coefficients[:, C.LOG_MIN], coefficients[:, C.LOG_MAX] = -6.0, -1.0
    return coefficients, codes


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("weight", [[2.5], [1.0], [4.0, -0.5, 1.0]], ids=str)
def test_guidance(launch, device, weight, layout):
    """F and F_u from one doubled batch, the next input written for both; where g (w - 1) = 0, F_u is not read."""
    shape, dtype = (3, 6, 4, 8), torch.bfloat16 if layout == "channels_last" else torch.float32
    tensors = inputs(shape, "contiguous", layout, dtype)
    tensors[1], F_u = halves(shape, layout, dtype, 0)
    tensors[4] = lay(torch.zeros(6, *shape[1:]), layout).to(dtype)
    coefficients, codes = rows_apart()
    guidance = torch.tensor(weight)
    F_u[coefficients[:3, C.GUIDE] * (guidance - 1) == 0] = NAN
    compare(launch, device, tensors, torch.arange(3), coefficients, codes, F_u, guidance, None)


@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_learned_variance(launch, device, layout, guided):
    """F and V are the halves of one output; where n_v = 0, V is not read. Guided: of a doubled batch, V its first half's."""
    shape, dtype = (3, 3, 4, 8), torch.float32 if guided else torch.bfloat16
    tensors = inputs(shape, layout, layout, dtype)
    F, V = halves((6, *shape[1:]), layout, dtype, 1)
    V[2] = NAN
    tensors[1], tensors[4] = F[:3], lay(torch.zeros(6, *shape[1:]), layout).to(dtype)
    more = (F[3:], torch.tensor([1.5])) if guided else (None, None)
    compare(launch, device, tensors, torch.arange(3), *rows_apart(), *more, V[:3])


@pytest.mark.parametrize("split", [(3,), (1, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_bits(launch, device, layout, split):
    """A row that is nothing but its first noise term; test_add_noise compares more values of the same device function."""
    tensors = inputs((3, 32, 12, 20), layout, layout, torch.float32, 0)
    x, F, saved, history, net_in = (_keep(t, device) for t in tensors)
    coefficients, codes = torch.zeros(1, len(C)), torch.tensor([[2**31 - 1, 0, 0, -1, 0]], dtype=torch.int32)
    coefficients[0, C.N1] = 1
    rest = coefficients.to(device), codes.to(device), torch.zeros(1, dtype=torch.int64, device=device)
    seeds = seed_tensor(SEEDS, device).split(split)
    parts = (t.split(split, 1 if t is history else 0) for t in (x, F, saved, history, net_in))
    for *part, seed in zip(*parts, seeds, strict=True):
        launch(*part, seed, *rest)
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

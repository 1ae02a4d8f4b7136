"""denoise_step: every term of a row, in every mixture of layouts and types, against the reference in float64."""

import itertools
import sys

import pytest
import torch

from fastdiff.ops import Domain, denoise_step, philox_normal, seed_tensor

module = sys.modules["fastdiff.ops.denoise_step"]
C, K = module.C, module.K
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def table(dtype=torch.float32):
    """Rows: everything at once; no noise, D kept; one noise; no evaluation, x saved; second noise, Dc kept in slot 0."""
    c = torch.randn(5, len(C), generator=torch.Generator().manual_seed(2)).to(dtype)
    k = torch.tensor(
        [[3, 9, 1, 1, 1], [0, 0, 0, 2, 0], [11, 0, 0, -1, 0], [5, 6, 1, -1, 0], [0, 7, 0, 0, 1]], dtype=torch.int32
    )
    c[1, [C.N1, C.N2, C.SAVED]] = 0
    c[2, [C.N2, C.H1, C.D_CLIP]] = 0
    c[3, [C.SKIP, C.OUT, C.D, C.D_CLIP]] = 0
    c[4, [C.N1, C.X]] = 0
    return c, k


def state(shape, slots=3, network=torch.float32, channels_last="", dtype=torch.float32, saved=True):
    """Arguments of the op; channels_last names those of x F saved history net_in that are."""
    generator = torch.Generator().manual_seed(3)

    def make(name, *shape, to=dtype):
        t = torch.randn(shape, generator=generator).to(to)
        last = name in channels_last.split() and len(shape) >= 4
        return t.movedim(-3, -1).contiguous().movedim(-1, -3) if last else t

    keep = make("saved", *shape) if saved else torch.empty(0, dtype=dtype)
    return {
        "x": make("x", *shape),
        "F": make("F", *shape, to=network),
        "saved": keep,
        "history": make("history", slots, *shape),
        "net_in": make("net_in", *shape, to=network),
        "seeds": seed_tensor(range(5, 5 + shape[0])),
    }


def copies(arguments, change=lambda t: t):
    return {k: v if v is None or k == "seeds" else change(v.clone()) for k, v in arguments.items()}


def compare(arguments, row, accurate, dtype=torch.float32):
    coefficients, codes = table(dtype)
    rows = torch.tensor(row if isinstance(row, list) else [row])
    got, plain, truth = copies(arguments), copies(arguments), copies(arguments, torch.Tensor.double)
    strides = {k: v.stride() for k, v in got.items() if v is not None}
    torch.ops.fastdiff.denoise_step(**got, coefficients=coefficients, codes=codes, row=rows)
    module.reference(**plain, coefficients=coefficients, codes=codes, row=rows)
    module.reference(**truth, coefficients=coefficients.double(), codes=codes, row=rows)
    # One term may be far larger than their sum: the floor is rounding at the largest term.
    largest = 4 * coefficients.abs().max().item() ** 2 * 5
    for name in ("x", "saved", "history", "net_in"):
        assert got[name].stride() == strides[name]
        accurate(got[name], plain[name], truth[name], floor=largest * torch.finfo(dtype).eps)
    assert arguments["F"] is None or torch.equal(got["F"], arguments["F"]), "F is only read"


@pytest.mark.parametrize("row", range(5))
@pytest.mark.parametrize(
    "channels_last",
    ["", "F net_in", "x F saved history net_in", "x saved", "history"],
    ids=lambda s: s.replace(" ", "+") or "none",
)
def test_values(isa, row, channels_last, accurate):
    # Whole Philox vectors; samples that are no whole number of blocks; one channel; more channels than a tile has room for.
    for shape in [(2, 3, 16, 16), (3, 3, 7, 5), (2, 1, 5, 5), (1, 130, 9, 5)]:
        compare(state(shape, channels_last=channels_last), row, accurate)


@pytest.mark.parametrize("network", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(isa, network, dtype, accurate):
    for shape, channels_last in itertools.product([(2, 3, 16, 16), (1, 3, 7, 5)], ["", "F net_in"]):
        compare(state(shape, network=network, channels_last=channels_last, dtype=dtype), 0, accurate, dtype)


@pytest.mark.parametrize(
    "shape", [(2, 3, 0, 4), (0, 3, 4, 4), (1, 1, 1, 1), (4, 10), (5,), (2, 3, 50), (1, 2, 3, 4, 5), (1, 3, 200, 100)]
)
def test_sizes(isa, shape, accurate):
    compare(state(shape), 0, accurate)


def test_absent_arguments(isa, accurate):
    for slots, saved, network in itertools.product((0, 1, 6), (False, True), (False, True)):
        arguments = state((2, 3, 6, 6), slots, saved=saved)
        if not network:
            arguments["F"] = None
        for row in (0, 3):
            compare(arguments, row, accurate)


def test_a_row_per_sample(isa, accurate):
    for channels_last in ("", "x F saved history net_in"):
        compare(state((5, 3, 8, 7), channels_last=channels_last), [4, 0, 3, 1, 2], accurate)


def test_views(isa, accurate):
    whole = state((4, 6, 10, 12))
    for view in (lambda t: t[..., 1:4, :, :], lambda t: t[..., ::2, 1::3], lambda t: t.transpose(-1, -2)):
        compare({k: v if k == "seeds" else view(v) for k, v in whole.items()}, 0, accurate)


def test_what_surrounds_a_view_stays(isa):
    arguments, (coefficients, codes) = state((4, 6, 10, 12)), table()
    before = arguments["x"].clone()
    inside = {k: v if k == "seeds" else v[..., 1:4, ::2, :] for k, v in arguments.items()}
    torch.ops.fastdiff.denoise_step(**inside, coefficients=coefficients, codes=codes, row=torch.tensor([0]))
    outside = torch.ones_like(before, dtype=torch.bool)
    outside[:, 1:4, ::2] = False
    assert torch.equal(arguments["x"][outside], before[outside])
    assert not torch.equal(arguments["x"][~outside], before[~outside])


@pytest.mark.parametrize("channels_last", ["", "x"])
def test_noise_bits(isa, channels_last):
    arguments, (coefficients, codes) = state((3, 3, 13, 11), channels_last=channels_last), table()
    coefficients.zero_()
    coefficients[0, C.N2], coefficients[0, C.NEXT_IN] = 1, 1
    denoise_step(**arguments, coefficients=coefficients, codes=codes, row=torch.tensor([0]))
    noise = philox_normal(arguments["seeds"], 9, (3, 13, 11), domain=Domain.STEP)
    assert torch.equal(arguments["x"], noise) and torch.equal(arguments["net_in"], noise)


def test_unused_memory_is_not_read(isa):
    # A fresh history is uninitialised; a row that does not name it must not turn it into NaN.
    arguments, (coefficients, codes) = state((2, 3, 8, 8)), table()
    coefficients[:, [*range(C.H0, C.H3 + 1), C.SAVED]] = 0
    arguments["history"].fill_(float("nan")), arguments["saved"].fill_(float("nan"))
    denoise_step(**arguments, coefficients=coefficients, codes=codes, row=torch.tensor([2]))
    assert arguments["x"].isfinite().all() and arguments["net_in"].isfinite().all()


def test_nan_of_the_network_is_not_hidden(isa):
    arguments, (coefficients, codes) = state((2, 3, 8, 8)), table()
    arguments["F"][1, 2, 3, 4] = float("nan")
    denoise_step(**arguments, coefficients=coefficients, codes=codes, row=torch.tensor([0]))
    assert arguments["x"].isnan().nonzero().tolist() == [[1, 2, 3, 4]]


def test_batch_split(isa):
    coefficients, codes = table()
    whole = state((5, 3, 9, 7))
    parts = [
        {k: v[:, i:j].clone() if k == "history" else v[i:j].clone() for k, v in whole.items()} for i, j in ((0, 2), (2, 5))
    ]
    for arguments in (whole, *parts):
        denoise_step(**arguments, coefficients=coefficients, codes=codes, row=torch.tensor([0]))
    assert torch.equal(whole["x"], torch.cat([p["x"] for p in parts]))


@pytest.mark.parametrize("network", DTYPES)
def test_opcheck(network):
    arguments, (coefficients, codes) = state((2, 3, 4, 5), network=network, channels_last="F net_in"), table()
    args = (*arguments.values(), coefficients, codes, torch.tensor([0]))
    torch.library.opcheck(torch.ops.fastdiff.denoise_step.default, args)


def test_compiles_as_one_graph(accurate):
    coefficients, codes = table()

    def steps(x, F, saved, history, net_in, seeds, row):
        for _ in range(3):
            denoise_step(x, F, saved, history, net_in, seeds, coefficients, codes, row)
            F = net_in * 0.5
            row = row + 1
        return net_in + 0

    eager, compiled = state((2, 3, 8, 8)), state((2, 3, 8, 8))
    row = torch.tensor([0])
    with torch.no_grad():
        expected, got = steps(**eager, row=row), torch.compile(steps, fullgraph=True)(**compiled, row=row)
    torch.testing.assert_close(got, expected)
    for name in ("x", "saved", "history", "net_in"):
        torch.testing.assert_close(compiled[name], eager[name])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)}, "x: the sampler's state"),
        ({"F": torch.zeros(2, 3, 4, 4)}, "F: shape"),
        ({"net_in": torch.zeros(2, 3, 4)}, "net_in: shape"),
        ({"saved": torch.zeros(1)}, "saved: shape"),
        ({"history": torch.zeros(2, 3, 4, 5)}, "history: expected"),
        ({"history": torch.zeros(1, 2, 3, 4, 5, dtype=torch.float64)}, "must have x's dtype"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds: expected int64"),
        ({"coefficients": torch.zeros(5, 3)}, "coefficients: expected"),
        ({"codes": torch.zeros(5, len(K))}, "codes: expected int32"),
        ({"row": torch.tensor([0, 1, 2])}, "row: expected int64"),
        ({"x": torch.zeros(2, 3, 4, 5, requires_grad=True)}, "no derivative"),
    ],
)
def test_errors_name_the_argument(change, message):
    coefficients, codes = table()
    arguments = state((2, 3, 4, 5)) | {"coefficients": coefficients, "codes": codes, "row": torch.tensor([0])} | change
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        denoise_step(**arguments)


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_outside_the_plan_is_refused(isa, row):
    coefficients, codes = table()
    with pytest.raises(RuntimeError, match="row: "):
        denoise_step(**state((2, 3, 4, 5)), coefficients=coefficients, codes=codes, row=torch.tensor([row]))

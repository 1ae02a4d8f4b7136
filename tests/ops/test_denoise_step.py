"""denoise_step: every term of a row, in every mixture of layouts and types, against the reference in float64."""

import itertools
import math
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
    c[2, C.N_V] = c[4, C.GUIDE] = 0  # a fixed variance; outside the guidance interval
    return c, k


def state(
    shape, slots=3, network=torch.float32, channels_last="", dtype=torch.float32, saved=True, guided=False, learned=False
):
    """Arguments of the op; channels_last names those of x F saved history net_in that are, F_u and V like F."""
    generator = torch.Generator().manual_seed(3)

    def make(name, *shape, to=dtype):
        t = torch.randn(shape, generator=generator).to(to)
        last = name in channels_last.split() and len(shape) >= 4
        return t.movedim(-3, -1).contiguous().movedim(-1, -3) if last else t

    keep = make("saved", *shape) if saved else torch.empty(0, dtype=dtype)
    extra = {}
    if guided:
        extra |= {"F_u": make("F", *shape, to=network), "guidance": make("w", shape[0])}
    if learned:
        extra["V"] = make("F", *shape, to=network).tanh()
    return extra | {
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
    for name in ("F", "F_u", "V", "guidance"):
        assert arguments.get(name) is None or torch.equal(got[name], arguments[name]), f"{name} is only read"


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


@pytest.mark.parametrize("channels_last", ["", "F net_in", "x F saved history net_in"], ids=lambda s: s or "none")
@pytest.mark.parametrize(("guided", "learned"), [(True, False), (False, True), (True, True)])
def test_guidance_and_learned_variance(isa, guided, learned, channels_last, accurate):
    for shape, network, row in itertools.product([(2, 3, 16, 16), (3, 3, 7, 5)], DTYPES[:2], [0, 1, 2, 4, [4, 0, 2]]):
        if not isinstance(row, list) or len(row) == shape[0]:
            compare(state(shape, 3, network, channels_last, guided=guided, learned=learned), row, accurate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_weight_for_all_and_mixed_types(isa, dtype, accurate):
    arguments = state((3, 2, 5, 5), guided=True, learned=True, dtype=dtype)
    mixed = {"guidance": arguments["guidance"][:1], "F_u": arguments["F_u"].bfloat16(), "V": arguments["V"].half()}
    compare(arguments | mixed, 0, accurate, dtype)


def test_halves_of_one_output(isa, accurate):
    """[2 B, 2 C, H, W]: the conditional half of the batch first, the noise estimate first among the channels."""
    for channels_last in (False, True):
        both = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
        both = both.to(memory_format=torch.channels_last) if channels_last else both
        parts = {"F": both[:2, :3], "F_u": both[2:, :3], "V": both[:2, 3:]}
        arguments = state((2, 3, 8, 8), network=torch.bfloat16, guided=True, learned=True) | parts
        last = torch.channels_last if channels_last else torch.contiguous_format
        arguments["net_in"] = torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=last)
        for row in (0, 1):
            compare(arguments, row, accurate)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_next_input_is_written_for_every_branch(isa, copies, accurate):
    for shape, last in itertools.product([(2, 3, 16, 16), (3, 3, 7, 5)], (False, True)):
        arguments = state(shape, channels_last="x F saved history" if last else "")
        arguments["net_in"] = torch.full((copies * shape[0], *shape[1:]), float("nan"))
        if last:
            arguments["net_in"] = arguments["net_in"].to(memory_format=torch.channels_last)
        compare(arguments, 0, accurate)


def test_guidance_is_classifier_free_guidance(isa):
    """w = 0: F_u alone; w = 1: F alone; g = 0: F alone, whatever w; F_u is then not read."""
    coefficients, codes = torch.zeros(2, len(C)), torch.tensor([[0, 0, 0, -1, 0]] * 2, dtype=torch.int32)
    coefficients[:, C.OUT] = coefficients[:, C.D] = 1
    coefficients[0, C.GUIDE] = 1
    for w, row, expected in ((0.0, 0, "F_u"), (1.0, 0, "F"), (3.0, 0, None), (3.0, 1, "F")):
        a = state((2, 3, 4, 5), guided=True) | {"guidance": torch.tensor([w])}
        want = a[expected].clone() if expected else a["F_u"] + w * (a["F"] - a["F_u"])
        if expected == "F":
            a["F_u"].fill_(float("nan"))
        denoise_step(**a, coefficients=coefficients, codes=codes, row=torch.tensor([row]))
        torch.testing.assert_close(a["x"], want, rtol=1e-5, atol=1e-6)


def test_learned_deviation_lies_between_its_ends(isa):
    """V = -1 is the smallest standard deviation, 1 the largest, 0 their geometric mean."""
    coefficients, codes = torch.zeros(1, len(C)), torch.tensor([[6, 0, 0, -1, 0]], dtype=torch.int32)
    low, high = 1e-10, 4.0
    coefficients[0, [C.N_V, C.LOG_MIN, C.LOG_MAX]] = torch.tensor([1.0, math.log(low**2), math.log(high**2)])
    for value, deviation in ((-1, low), (0, math.sqrt(low * high)), (1, high)):
        a = state((2, 3, 5, 7), learned=True)
        a["V"].fill_(value)
        denoise_step(**a, coefficients=coefficients, codes=codes, row=torch.tensor([0]))
        noise = philox_normal(a["seeds"], 6, (3, 5, 7), domain=Domain.STEP)
        torch.testing.assert_close(a["x"], deviation * noise, rtol=1e-5, atol=0)


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
    coefficients, codes = table()
    for more in ({}, {"guided": True, "learned": True}):
        arguments = state((2, 3, 4, 5), network=network, channels_last="F net_in", **more)
        arguments |= {"coefficients": coefficients, "codes": codes, "row": torch.tensor([0])}
        torch.library.opcheck(torch.ops.fastdiff.denoise_step.default, (), arguments)


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

"""langevin_step: the corrector of score SDE against its formula in float64, in every layout, type and mode."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import Prediction
from fastdiff.ops import Domain, langevin_step, philox_normal, seed_tensor
from fastdiff.schedules import VE, VP

module = sys.modules["fastdiff.ops.langevin_step"]
L, Norms = module.L, module.Norms
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SNR = 0.16


def table(norms, dtype=torch.float32):
    """Two rows: VP with an eps network, VE with a score network; and their draws."""
    rows = []
    for schedule, kind, t, step in ((VP(), "eps", 0.4, 0.9), (VE(), "score", 0.3, 1.0)):
        c = Prediction(kind).coefficients(schedule, t)
        a, s = (float(f(t)) for f in (schedule.alpha, schedule.sigma))
        size = 2 * step * (SNR * s) ** 2 if norms == Norms.GIVEN else 2 * step * SNR**2
        rows.append(module.langevin_row(c.c_skip, c.c_out, a, s, size, 0.7))
    return torch.tensor(rows, dtype=torch.float64).to(dtype), torch.tensor([3, -1], dtype=torch.int32)


def state(shape, network=torch.float32, channels_last="", dtype=torch.float32, mean=True):
    """Tensors of the op; channels_last names those of x F net_in mean that are."""
    generator = torch.Generator().manual_seed(3)

    def make(name, to):
        t = torch.randn(shape, generator=generator).to(to)
        last = name in channels_last.split() and len(shape) >= 4
        return t.movedim(-3, -1).contiguous().movedim(-1, -3) if last else t

    return {
        "x": make("x", dtype),
        "F": make("F", network),
        "net_in": make("net_in", network),
        "mean": make("mean", dtype) if mean else None,
        "seeds": seed_tensor(range(5, 5 + shape[0])),
    }


def copies(arguments, change=lambda t: t):
    return {k: v if v is None or k == "seeds" else change(v.clone()) for k, v in arguments.items()}


def formula(x, F, seeds, coefficients, draws, row, norms):
    """score_sde's LangevinCorrector in float64, from D: x', x_mean, and the next input."""
    out = []
    for b in range(len(x)):
        r = int(row[b % len(row)])
        c = coefficients[r].double()
        z = philox_normal(seeds[b : b + 1], int(draws[r]) & 0xFFFFFFFF, x.shape[1:], domain=Domain.STEP)[0].double()
        out.append((c, z, c[L.SCORE_X] * x[b].double() + c[L.SCORE_F] * F[b].double()))
    z_norms, s_norms = ([float(v[i].norm()) for v in out] for i in (1, 2))
    results = []
    for b, (c, z, s) in enumerate(out):
        ratio = z_norms[b] / s_norms[b] if norms == Norms.SAMPLE else sum(z_norms) / sum(s_norms)
        eps = float(c[L.STEP]) * (1 if norms == Norms.GIVEN else ratio**2)
        mean = x[b].double() + eps * s
        results.append((mean + (2 * eps) ** 0.5 * z, mean, c[L.NEXT_IN] * (mean + (2 * eps) ** 0.5 * z)))
    return [torch.stack(v) for v in zip(*results, strict=True)]


def compare(arguments, norms, accurate, row=(0,), dtype=torch.float32):
    coefficients, draws = table(norms, dtype)
    rows = torch.tensor(row)
    got, plain = copies(arguments), copies(arguments)
    strides = {k: v.stride() for k, v in got.items() if v is not None}
    torch.ops.fastdiff.langevin_step(**got, coefficients=coefficients, draws=draws, row=rows, norms=int(norms))
    module.reference(**plain, coefficients=coefficients, draws=draws, row=rows, norms=int(norms))
    if not arguments["x"].numel():
        return
    truth = formula(arguments["x"], arguments["F"], arguments["seeds"], coefficients, draws, rows, norms)
    for name, want in zip(("x", "mean", "net_in"), truth, strict=True):
        if got[name] is not None:
            assert got[name].stride() == strides[name]
            # one term of the sum may be several times larger than the sum
            accurate(got[name], plain[name], want, floor=16 * torch.finfo(dtype).eps)
    assert torch.equal(got["F"], arguments["F"]), "F is only read"


@pytest.mark.parametrize("norms", list(Norms), ids=lambda n: n.name)
@pytest.mark.parametrize(
    "channels_last", ["", "F net_in", "x F net_in mean", "mean"], ids=lambda s: s.replace(" ", "+") or "none"
)
def test_values(isa, norms, channels_last, accurate):
    # One tile; several, whole and not; samples that are no whole number of blocks; more channels than a tile has room for.
    for shape in [(2, 3, 16, 16), (3, 3, 40, 40), (2, 3, 7, 5), (2, 1, 5, 5), (1, 130, 9, 5)]:
        compare(state(shape, channels_last=channels_last), norms, accurate)


@pytest.mark.parametrize("network", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(isa, network, dtype, accurate):
    for shape, channels_last in (((2, 3, 16, 16), "F net_in"), ((1, 3, 7, 5), "")):
        compare(state(shape, network, channels_last, dtype), Norms.SAMPLE, accurate, (1,), dtype)


@pytest.mark.parametrize(
    "shape", [(2, 3, 0, 4), (0, 3, 4, 4), (1, 1, 1, 1), (4, 10), (5,), (2, 3, 50), (1, 2, 3, 4, 5), (1, 3, 200, 100)]
)
@pytest.mark.parametrize("norms", list(Norms), ids=lambda n: n.name)
def test_sizes(isa, shape, norms, accurate):
    compare(state(shape, mean=len(shape) != 2), norms, accurate)


def test_a_row_per_sample(isa, accurate):
    for norms in Norms:
        compare(state((3, 3, 8, 7)), norms, accurate, (1, 0, 1))


def test_views(isa, accurate):
    whole = state((4, 6, 10, 12))
    for view in (lambda t: t[..., 1:4, :, :], lambda t: t[..., ::2, 1::3], lambda t: t.transpose(-1, -2)):
        compare({k: v if k == "seeds" else view(v) for k, v in whole.items()}, Norms.SAMPLE, accurate)


def run(arguments, norms=Norms.SAMPLE, row=(0,), **change):
    coefficients, draws = table(norms)
    langevin_step(**arguments, coefficients=coefficients, draws=draws, row=torch.tensor(row), norms=norms, **change)
    return arguments


@pytest.mark.parametrize("shape", [(5, 3, 9, 7), (5, 3, 48, 48)])
@pytest.mark.parametrize("channels_last", ["", "x F net_in mean"])
def test_a_sample_does_not_depend_on_the_batch(isa, shape, channels_last):
    whole = state(shape, channels_last=channels_last)
    parts = [{k: v[i:j].clone() for k, v in whole.items()} for i, j in ((0, 1), (1, 5))]
    for arguments in (whole, *parts):
        run(arguments)
    for name in ("x", "mean", "net_in"):
        assert torch.equal(whole[name], torch.cat([p[name] for p in parts]))
    batch = [run(state(shape), Norms.BATCH)["x"], run({k: v[:2] for k, v in state(shape).items()}, Norms.BATCH)["x"]]
    assert not torch.equal(batch[0][:2], batch[1]), "averaged over the batch it does"


def test_threads_do_not_change_bits():
    before, bits = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            bits.append(run(state((2, 3, 64, 64)))["x"])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits[0], bits[1]) and torch.equal(bits[0], bits[2])


def test_instruction_sets_agree_in_the_step_size(isa):
    from fastdiff import _C

    here = run(state((2, 3, 40, 40)))["x"]
    _C.use_isa("baseline")
    torch.testing.assert_close(run(state((2, 3, 40, 40)))["x"], here, rtol=1e-6, atol=1e-6)


def test_the_step_size_is_the_signal_to_noise_ratio(isa):
    """By construction ||sqrt(2 eps) z|| = ||eps score|| / snr: what `step` = 2 snr^2 means."""
    a = state((1, 3, 20, 20))
    before = a["x"].clone()
    run(a, row=(1,))
    drift, noise = (a["mean"] - before).double().norm(), (a["x"] - a["mean"]).double().norm()
    assert float(drift / noise) == pytest.approx(SNR, rel=1e-4)


@pytest.mark.parametrize("norms", [Norms.SAMPLE, Norms.BATCH], ids=lambda n: n.name)
def test_no_score_no_step(isa, norms):
    """||score|| = 0: the sample stays; of a batch with one other sample, only its own step is 0 where norms are its own."""
    a = state((2, 3, 16, 16))
    a["x"][0], a["F"][0] = 0, 0
    if norms == Norms.BATCH:
        a["x"][1], a["F"][1] = 0, 0
    run(a, norms)
    assert a["x"].isfinite().all() and not a["x"][0].any() and not a["mean"][0].any() and not a["net_in"][0].any()
    assert bool(a["x"][1].any()) == (norms == Norms.SAMPLE)


def test_nan_of_the_network_is_not_hidden(isa):
    a = state((3, 3, 40, 40))
    a["F"][1, 2, 3, 4] = float("nan")
    run(a)
    assert a["x"][1].isnan().all() and a["x"][[0, 2]].isfinite().all()
    b = state((3, 3, 8, 8))
    b["F"][1, 2, 3, 4] = float("nan")
    run(b, Norms.GIVEN)
    assert b["x"].isnan().nonzero().tolist() == [[1, 2, 3, 4]]


def test_score_of_a_perfect_network():
    """On Gaussian data every kind of network gives the one score -x / (alpha^2 + sigma^2), at the smallest sigma too."""
    for kind, schedule in (("eps", VE()), ("score", VE()), ("edm", VE()), ("v", VP()), ("x0", VP())):
        t = schedule.t_min
        c, p = Prediction(kind).coefficients(schedule, t), Prediction(kind)
        a, s = (float(f(t)) for f in (schedule.alpha, schedule.sigma))
        of_x, of_f, *_ = module.langevin_row(c.c_skip, c.c_out, a, s, 0.0)
        d = a / (a**2 + s**2)  # D of unit x
        f = (d - float(c.c_skip)) / float(c.c_out)
        assert of_x + of_f * f == pytest.approx(-1 / (a**2 + s**2), rel=1e-9), (kind, p)


def test_langevin_dynamics_reaches_its_distribution():
    """60 given steps on a Gaussian of variance 1 from variance 9: eps small, so the variance is 1 / (1 - eps / 2)."""
    n, eps = 4096, 0.1
    x = 3 * philox_normal(seed_tensor(range(n)), 0, (4,))
    coefficients = torch.tensor([module.langevin_row(0.0, 0.0, 1.0, 1.0, eps)] * 60)  # D = 0, sigma = 1: score = -x
    draws, row = torch.arange(60, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    F, net_in = torch.zeros_like(x), torch.empty_like(x)
    for _ in range(60):
        langevin_step(x, F, net_in, seed_tensor(range(n)), coefficients, draws, row, Norms.GIVEN)
        row += 1
    # 16384 values: four deviations of a sample variance are 4 sqrt(2 / 16384) = 0.044
    assert float(x.var()) == pytest.approx(1 / (1 - eps / 2), rel=0.045)
    assert torch.equal(net_in, torch.zeros_like(x))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("norms", list(Norms), ids=lambda n: n.name)
def test_opcheck(norms, mean):
    coefficients, draws = table(norms)
    a = state((2, 3, 4, 5), torch.bfloat16, "F net_in", mean=mean)
    args = (*a.values(), coefficients, draws, torch.tensor([0]), int(norms))
    torch.library.opcheck(torch.ops.fastdiff.langevin_step.default, args)


def test_compiles_as_one_graph():
    coefficients, draws = table(Norms.SAMPLE)

    def steps(x, F, net_in, mean, seeds, row):
        for _ in range(2):
            langevin_step(x, F, net_in, seeds, coefficients, draws, row, mean=mean)
            F = net_in * 0.5
            row = row + 1
        return net_in + 0

    eager, compiled = state((2, 3, 8, 8)), state((2, 3, 8, 8))
    row = torch.tensor([0])
    with torch.no_grad():
        expected, got = steps(**eager, row=row), torch.compile(steps, fullgraph=True)(**compiled, row=row)
    torch.testing.assert_close(got, expected)
    for name in ("x", "mean", "net_in"):
        torch.testing.assert_close(compiled[name], eager[name])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)}, "x: the sampler's state"),
        ({"x": torch.zeros(())}, r"x: expected \[B, ...\]"),
        ({"F": torch.zeros(2, 3, 4, 4)}, "F: shape"),
        ({"F": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, "F: expected a floating-point"),
        ({"net_in": torch.zeros(2, 3, 4)}, "net_in: shape"),
        ({"mean": torch.zeros(2, 3, 4)}, "mean: shape"),
        ({"mean": torch.zeros(2, 3, 4, 5).double()}, "mean: expected x's dtype"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds: expected int64"),
        ({"coefficients": torch.zeros(2, 3)}, "coefficients: expected"),
        ({"coefficients": torch.zeros(2, len(L)).double()}, "coefficients: expected"),
        ({"draws": torch.zeros(2)}, "draws: expected int32"),
        ({"row": torch.tensor([0, 1, 2])}, "row: expected int64"),
        ({"norms": 3}, "norms: 3 is not known"),
        ({"x": torch.zeros(2, 3, 4, 5, requires_grad=True)}, "no derivative"),
        ({"F": torch.zeros(2, 3, 4, 5, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_errors_name_the_argument(change, message):
    coefficients, draws = table(Norms.SAMPLE)
    given = state((2, 3, 4, 5)) | {"coefficients": coefficients, "draws": draws, "row": torch.tensor([0])} | change
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        langevin_step(**given)


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    network=st.sampled_from(DTYPES),
    step=st.integers(1, 2),
    norms=st.sampled_from(Norms),
    mean=st.booleans(),
    broken=st.sampled_from(("", "F", "net_in", "seeds", "draws", "coefficients", "row", "norms", "mean")),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_or_a_clean_refusal(shape, network, step, norms, mean, broken):
    """Straight through the dispatcher: the formula, or an exception that names what is wrong, never a crash."""
    a = state((*shape[:-1], shape[-1] * step), network, mean=mean)
    a = {k: v if v is None or k == "seeds" else v[..., ::step] for k, v in a.items()}
    a["seeds"] = seed_tensor(range(a["x"].shape[0]))
    coefficients, draws = table(norms)
    arguments = a | {"coefficients": coefficients, "draws": draws, "row": torch.tensor([1]), "norms": int(norms)}
    if broken in ("F", "net_in", "seeds", "draws", "coefficients"):
        arguments[broken] = arguments[broken].flatten()[1:].new_zeros(arguments[broken].numel() + 3)
    if broken in ("row", "norms"):
        arguments[broken] = torch.tensor([2]) if broken == "row" else 7
    if broken == "mean":
        arguments["mean"] = torch.zeros(11, 1, 1)
    if broken:
        with pytest.raises(RuntimeError, match=f"{broken}: "):
            torch.ops.fastdiff.langevin_step(**arguments)
        return
    truth = copies(a)
    torch.ops.fastdiff.langevin_step(**arguments)
    module.reference(**truth, coefficients=coefficients, draws=draws, row=torch.tensor([1]), norms=int(norms))
    if norms == Norms.GIVEN or a["x"].numel():
        torch.testing.assert_close(a["x"], truth["x"], rtol=1e-4, atol=1e-4)

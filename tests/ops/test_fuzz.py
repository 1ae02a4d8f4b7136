"""Whatever tensors an op is handed, it answers as its reference does or raises an exception that says something: no crash.

Through torch.ops, where no Python wrapper has looked at the arguments first.
"""

import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fastdiff.ops  # noqa: F401  (registers the ops)

step, langevin = (sys.modules[f"fastdiff.ops.{name}"] for name in ("denoise_step", "langevin_step"))
FAR = 2**62  # an int that any product overflows
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
EPS = st.sampled_from((1e-5, 1e-2, 0.0, -1.0, float("nan")))
SIZES = st.lists(st.integers(0, 5), min_size=0, max_size=4)


@st.composite
def tensors(draw, usual=None, dtypes=FLOATS):
    """Of the usual shape and a usual dtype most of the time; contiguous, transposed, strided, expanded or offset."""
    shape = tuple(draw(st.one_of(st.just(usual), st.just(usual), SIZES))) if usual is not None else tuple(draw(SIZES))
    dtype = draw(st.one_of(st.sampled_from(dtypes), st.sampled_from(dtypes), st.sampled_from(FLOATS + OTHERS)))
    memory = draw(st.sampled_from(("contiguous", "last", "strided", "expanded", "offset", "meta")))
    values = torch.linspace(-2, 2, max(1, torch.Size(shape).numel() * 2 + 1))
    if memory == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if memory == "expanded" and shape:
        return values[:1].to(dtype).expand(shape)
    if memory == "strided" and shape:
        return values[: 2 * torch.Size(shape).numel()].to(dtype).reshape(*shape[:-1], 2 * shape[-1])[..., ::2]
    flat = values[1 if memory == "offset" else 0 :][: torch.Size(shape).numel()].to(dtype)
    if memory == "last" and len(shape) == 4:
        return flat.reshape(shape).contiguous(memory_format=torch.channels_last)
    return flat.reshape(shape)


@st.composite
def calls(draw, network=(), **usual):
    """Arguments by name. Values are strategies or tensors: these are laid out anew, all float32 ones in one type, those of
    the network in any; at most one of the tensors is wrong."""
    wrong = draw(st.sampled_from(("", "", "", *(name for name, value in usual.items() if isinstance(value, torch.Tensor)))))
    state = draw(st.sampled_from((torch.float32, torch.float32, torch.float64)))
    made = {}
    for name, value in usual.items():
        if not isinstance(value, torch.Tensor):
            made[name] = draw(value)
            continue
        own = state if value.dtype == torch.float32 else value.dtype
        dtype = draw(st.sampled_from(FLOATS)) if name in network else own
        memory = st.sampled_from(("contiguous", "last", "strided", "offset"))
        made[name] = draw(tensors(tuple(value.shape), (dtype,))) if name == wrong else laid(value.to(dtype), draw(memory))
    return made


def laid(t, memory):
    """The same values in memory of their own."""
    if memory == "last" and t.dim() > 2:
        return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    if memory == "strided" and t.dim():
        return t.repeat_interleave(2, -1)[..., ::2]
    if memory == "offset" and t.dim():
        return torch.cat((t, t), -1)[..., t.shape[-1] :]
    return t.clone(memory_format=torch.contiguous_format)


def agree(name, *arguments, op=None):
    """The op and its reference: both raise, or both answer alike and leave alike arguments."""
    module = sys.modules[f"fastdiff.ops.{name}"]
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    try:
        made = (op or getattr(torch.ops.fastdiff, name))(*arguments)
    except Exception as error:  # any exception will do, as long as it is one and says something
        assert str(error)
        return
    if any(isinstance(a, torch.Tensor) and a.is_meta for a in arguments):
        return  # no values, no memory: shapes are opcheck's to compare
    wanted = module.reference(*copies)
    for ours, theirs in zip(*map(tensors_of, ((made, arguments), (wanted, copies))), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(ours.dtype, 1e-4)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def tensors_of(result_and_arguments):
    result, arguments = result_and_arguments
    return [t for t in (*(result if isinstance(result, tuple) else (result,)), *arguments) if isinstance(t, torch.Tensor)]


quickly = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # what fails is small already
)  # fmt: skip


@pytest.fixture(autouse=True)
def lenient(monkeypatch):
    monkeypatch.delenv("FASTDIFF_STRICT", raising=False)


@quickly
@given(
    seeds=tensors((3,), (torch.int64,)),
    draw=st.sampled_from((0, 7, 2**32 - 1)),
    domain=st.integers(0, 3),
    shape=st.lists(st.integers(-1, 5), max_size=4),
    dtype=st.sampled_from(FLOATS + OTHERS),
)
def test_philox_normal(seeds, draw, domain, shape, dtype):
    agree("philox_normal", seeds, draw, domain, shape, dtype)


@quickly
@given(
    x0=tensors((3, 2, 3, 5)),
    seeds=tensors((3,), (torch.int64,)),
    coefficients=tensors((3, 2, 2), (torch.float32, torch.float64)),
    draw=st.sampled_from((0, 7, 2**32 - 1)),
)
def test_add_noise(x0, seeds, coefficients, draw):
    agree("add_noise", x0, seeds, coefficients, draw, 2)


@quickly
@given(
    x=tensors((2, 4, 3, 5)),
    weight=tensors((4,)),
    bias=tensors((4,)),
    groups=st.sampled_from((2, 4, 1, 3, 0, -1, FAR)),
    eps=EPS,
    add=st.none() | tensors((2, 4)),
    scale=st.none() | tensors((2, 4)),
    shift=st.none() | tensors((2, 4)),
    silu=st.booleans(),
)
def test_group_norm_silu(x, weight, bias, groups, eps, add, scale, shift, silu):
    agree("group_norm_silu", x, weight, bias, groups, eps, add, scale, shift, None, silu)


def ramp(*shape):
    return torch.linspace(-2, 2, torch.Size(shape).numel()).reshape(shape)


SCALES = st.sampled_from((1.0, 0.0, -3.0, 1e-3, float("inf"), float("nan")))
WHOLES = st.sampled_from((1, 2, 3, 4, 0, -1, FAR, -FAR))
SHAPES = st.sampled_from(((2, 3, 3, 4), (2, 4, 1, 1), (2, 1, 2, 2), (0, 3, 2, 2), (2, 5), (3,)))


def step_calls(shape):
    """Every row of a plan of three, and rows outside it; F, F_u, V and a history may be missing."""
    state, batch = ramp(*shape), shape[0]
    codes = torch.tensor([[1, 2, 1, 0, 0], [3, 4, 0, -1, 0], [-5, 6, 0, 2, 1]], dtype=torch.int32)
    tables = {
        "coefficients": ramp(3, len(step.C)),
        "codes": codes,
        "row": st.integers(-1, 3).map(lambda r: torch.tensor([r])),
    }
    branch = st.none() | tensors(shape)
    return st.tuples(st.integers(0, 5), st.integers(1, 2)).flatmap(
        lambda n: calls(
            network=("F", "net_in"), x=state, F=state if n[0] != 5 else st.none(), saved=state,
            history=state.expand(n[0], *shape), net_in=torch.cat([state] * n[1]), seeds=torch.arange(batch), **tables,
            F_u=branch, guidance=st.none() | tensors((1,), (torch.float32,)), V=branch,
        )
    )  # fmt: skip


@pytest.mark.parametrize("op", [None, step.denoise_step], ids=["torch.ops", "fastdiff.ops"])
@quickly
@given(SHAPES.flatmap(step_calls))
def test_denoise_step(op, arguments):
    agree("denoise_step", *arguments.values(), op=op)


def langevin_calls(shape):
    rows = {"draws": torch.arange(2, dtype=torch.int32), "row": st.integers(-1, 2).map(lambda r: torch.tensor([r]))}
    state, optional = ramp(*shape), st.none() | tensors(shape, (torch.float32,))
    return calls(
        network=("F", "net_in"), x=state, F=state + 1, net_in=state, mean=optional, seeds=torch.arange(shape[0]),
        coefficients=ramp(2, len(langevin.L)), **rows, norms=st.integers(-1, 3),
    )  # fmt: skip


@quickly
@given(SHAPES.flatmap(langevin_calls))
def test_langevin_step(arguments):
    agree("langevin_step", *arguments.values())


@quickly
@given(
    x=tensors((2, 3, 4, 5)),
    taps=tensors((4,)),
    up=WHOLES,
    down=WHOLES,
    p0=st.integers(-6, 6) | WHOLES,
    size=st.tuples(st.integers(-1, 7), st.integers(-1, 7)) | st.tuples(WHOLES, WHOLES),
)
def test_resample(x, taps, up, down, p0, size):
    agree("resample", x, taps, up, down, p0, *size)


@quickly
@given(t=tensors((5,)), freqs=tensors((4,)), scale=SCALES, sin_first=st.booleans(), dtype=st.sampled_from(FLOATS + OTHERS))
def test_embedding(t, freqs, scale, sin_first, dtype):
    agree("embedding", t, freqs, scale, sin_first, dtype)


@quickly
@given(
    t=tensors((5,)),
    table=st.none() | tensors((4,), (torch.float64,)),
    law=st.integers(-1, 7),
    target=st.integers(-1, 7),
    numbers=st.tuples(*[SCALES] * 5),
    raw=st.booleans(),
    slopes=st.booleans(),
    dtype=st.sampled_from(FLOATS + OTHERS),
)
def test_schedule_coefficients(t, table, law, target, numbers, raw, slopes, dtype):
    agree("schedule_coefficients", t, table, law, target, *numbers, raw, slopes, dtype)


@quickly
@given(
    calls(
        network=("norm_weight", "norm_bias", "qkv_weight", "out_weight"), x=ramp(2, 4, 3, 2), norm_weight=ramp(4),
        norm_bias=ramp(4), groups=WHOLES, eps=EPS, qkv_weight=ramp(18, 4), qkv_bias=st.none() | tensors((18,)),
        out_weight=ramp(4, 6), out_bias=st.none() | tensors((4,)), heads=WHOLES, scale=SCALES, out_scale=SCALES,
        stats=st.none() | tensors((2, 2, 2)),
    )
)  # fmt: skip
def test_group_norm_attention(arguments):
    agree("group_norm_attention", *arguments.values())

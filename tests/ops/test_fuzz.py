"""Whatever tensors an op is handed, it answers as its reference does or raises an exception that says something: no crash.

Through torch.ops, where no Python wrapper has looked at the arguments first.
"""

import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fastdiff.ops  # noqa: F401  (registers the ops)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
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


def agree(name, *arguments):
    """The op and its reference: both raise, or both answer alike. Meta tensors have no values to compare."""
    module = sys.modules[f"fastdiff.ops.{name}"]
    try:
        made = getattr(torch.ops.fastdiff, name)(*arguments)
    except Exception as error:  # any exception will do, as long as it is one and says something
        assert str(error)
        return
    wanted = module.reference(*arguments)
    for ours, theirs in zip(*((t if isinstance(t, tuple) else (t,)) for t in (made, wanted)), strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        if ours.device.type != "meta":
            tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(ours.dtype, 1e-4)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


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
    shape=st.lists(st.integers(-1, 5), max_size=4),
    dtype=st.sampled_from(FLOATS + OTHERS),
)
def test_philox_normal(seeds, draw, shape, dtype):
    agree("philox_normal", seeds, draw, 1, shape, dtype)


@quickly
@given(
    x0=tensors((3, 2, 3, 5)),
    seeds=tensors((3,), (torch.int64,)),
    coefficients=tensors((3, 2, 2), (torch.float32, torch.float64)),
)
def test_add_noise(x0, seeds, coefficients):
    agree("add_noise", x0, seeds, coefficients, 0, 2)


@quickly
@given(
    x=tensors((2, 4, 3, 5)),
    weight=tensors((4,)),
    bias=tensors((4,)),
    groups=st.sampled_from((2, 4, 1, 3, 0, -1)),
    eps=st.sampled_from((1e-5, 1e-2, 0.0, -1.0, float("nan"))),
    add=st.none() | tensors((2, 4)),
    scale=st.none() | tensors((2, 4)),
    shift=st.none() | tensors((2, 4)),
    silu=st.booleans(),
)
def test_group_norm_silu(x, weight, bias, groups, eps, add, scale, shift, silu):
    agree("group_norm_silu", x, weight, bias, groups, eps, add, scale, shift, None, silu)

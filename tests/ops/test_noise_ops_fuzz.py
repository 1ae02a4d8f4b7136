"""Random arguments for the noise ops: each call equals the reference or raises a Python exception; none crashes."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff.ops  # noqa: F401  (registers the ops)

step, noising, normal = (sys.modules[f"fastdiff.ops.{name}"] for name in ("denoise_step", "add_noise", "philox_normal"))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FUZZ = settings(max_examples=60, deadline=None, derandomize=True)
shapes = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)
# Mostly right, so that most calls get as far as the kernel.
dtypes = st.sampled_from((*FLOATS, *FLOATS, *FLOATS, torch.int64, torch.bool))
layouts = st.sampled_from(("plain", "last", "every second", "expanded", "offset"))


def tensor(shape, dtype, layout="plain"):
    """Values in [-2, 2] by position, in one of several memory layouts."""
    t = torch.linspace(-2, 2, max(torch.Size(shape).numel(), 1))[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    if layout == "last" and len(shape) > 2:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "every second" and shape:
        return t.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and shape:
        return t[:1].expand(shape) if shape[0] else t
    if layout == "offset" and shape:
        return torch.cat((t, t), -1)[..., t.shape[-1] :]
    return t


def same_or_refused(op, reference, make, results):
    """results(arguments, returned) -> the tensors to compare."""
    ours, plain = make(), make()
    try:
        got = op(*ours)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return
    want = reference(*plain)
    for a, b in zip(results(ours, got), results(plain, want), strict=True):
        eps = torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=max(8 * eps, 1e-5) if eps < 1e-8 else 64 * eps)


@FUZZ
@given(shapes, dtypes, layouts, st.integers(0, 3), st.integers(-1, 1), dtypes)
def test_add_noise(shape, dtype, layout, forms, more, coefficient):
    batch = shape[0] if shape else 1

    def make():
        seeds = torch.arange(max(batch + (more if more < 0 else 0), 0))
        return tensor(shape, dtype, layout), seeds, tensor((batch, forms, 2 + (more > 0)), coefficient), 3, 2

    same_or_refused(torch.ops.fastdiff.add_noise, noising.reference, make, lambda a, out: [out])


@FUZZ
@given(
    st.lists(st.integers(-2, 70), max_size=3), dtypes, st.integers(-1, 2**32), st.integers(0, 3), dtypes, st.integers(0, 2)
)
def test_philox_normal(shape, seed_dtype, draw, domain, dtype, dims):
    def make():
        seeds = torch.arange(3).to(seed_dtype if dims == 0 else torch.int64).reshape((3, 1) if dims == 2 else (3,))
        return seeds, draw & normal.MASK, domain, shape, dtype

    same_or_refused(torch.ops.fastdiff.philox_normal, normal.reference, make, lambda a, out: [out])


# Which argument is made wrong, if any.
WRONG = ("", "", "", "", "F", "saved", "history", "net_in", "seeds", "coefficients", "codes", "row", "guidance", "V")


@pytest.mark.parametrize("wrapped", [False, True], ids=["torch.ops", "fastdiff.ops"])
@FUZZ
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple),
    st.sampled_from((torch.float32, torch.float32, torch.float64)),
    st.tuples(*[st.sampled_from(FLOATS)] * 4),
    st.tuples(*[layouts.filter(lambda name: name != "expanded")] * 7),
    st.sampled_from(WRONG),
    st.integers(0, 3),
    st.integers(1, 2),
    st.integers(-1, 3),
)
def test_denoise_step(wrapped, shape, dtype, network, layout, wrong, slots, copies, row):
    def make():
        a = {"x": tensor(shape, dtype, layout[0]), "F": tensor(shape, network[0], layout[1])}
        a["saved"] = tensor(shape, dtype, layout[2])
        a["history"] = tensor((slots, *shape), dtype, layout[3] if layout[3] != "last" else "plain")
        a["net_in"] = tensor((copies * shape[0], *shape[1:]), network[1], layout[4])
        a["seeds"] = torch.arange(shape[0])
        a["coefficients"] = tensor((3, len(step.C)), dtype)
        codes = torch.tensor([[1, 2, 1, 0, 0], [3, 4, 0, -1, 0], [5, 6, 0, 2, 1]], dtype=torch.int32)
        a |= {"codes": codes, "row": torch.tensor([row]), "F_u": tensor(shape, network[2], layout[5])}
        a |= {"guidance": tensor((1,), dtype), "V": tensor(shape, network[3], layout[6])}
        if wrong:
            a[wrong] = torch.cat((a[wrong], a[wrong]), -1) if slots else a[wrong].to(torch.int16)
        return tuple(a.values())

    op = step.denoise_step if wrapped else torch.ops.fastdiff.denoise_step
    same_or_refused(op, step.reference, make, lambda a, _: [a[0], a[2], a[3], a[4]])

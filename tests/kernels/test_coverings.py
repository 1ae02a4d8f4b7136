"""The Triton kernels over a pairwise covering of channels, groups, sizes, batches, layouts and types, against float64.

group_norm_silu has its own covering beside its other tests; philox_normal, embedding and schedule_coefficients see one
dimension only. Small cases by default; with `-m slow` up to 2^17 elements and every channel count.
"""

import importlib

import covering
import norm_cases
import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, check, lay

from fastdiff.ops import seed_tensor
from fastdiff.ops.add_noise import reference as add_noise_reference
from fastdiff.ops.denoise_step import C, K
from fastdiff.ops.denoise_step import reference as denoise_step_reference
from fastdiff.ops.group_norm_attention import reference as attention_reference
from fastdiff.ops.langevin_step import Norms
from fastdiff.ops.langevin_step import reference as langevin_step_reference
from fastdiff.ops.resample import reference as resample_reference

CHANNELS = norm_cases.PARAMETERS["channels"]
IMAGES = {
    "channels": [1, 3, 32, 96, 192, 320, 576, 1152],
    "size": [(1, 1), (7, 5), (8, 8), (13, 16)],
    "batch": [0, 1, 3],
    "layout": list(LAYOUTS),
    "dtype": list(DTYPES),
}
EVERY = {"channels": CHANNELS, "size": norm_cases.PARAMETERS["size"]}
TWO = {"net_layout": list(LAYOUTS), "row": [0, 1, 2]}
FORMS = {"forms": [1, 2, 3]}
FILTERS = {"filter": [(2, 1), (1, 2), (1, 1), (3, 2)], "taps": [1, 2, 4, 7], "pad": [-1, 0, 3]}
ATTENTION = {"groups": [1, 8, 32, "C"], "heads": [1, 2, 4], "biases": [True, False]}


def elements(case):
    return case["batch"] * case["channels"] * case["size"][0] * case["size"][1]


def cases(parameters, most=2**14, slow=2**17, valid=lambda case: True, work=elements):
    """Those of little work, then, marked slow, those of every channel count and size."""

    def within(limit):
        return lambda case: work(case) <= limit and valid(case)

    few = covering.pairwise(IMAGES | parameters, within(most))
    many = [case for case in covering.pairwise(IMAGES | EVERY | parameters, within(slow)) if case not in few]
    found = []
    for case in few + many:
        name = "-".join(str(v).replace(" ", "").replace("torch.", "") for v in case.values())
        found.append(pytest.param(case, id=name, marks=() if case in few else pytest.mark.slow))
    return found


def shape(case):
    return case["batch"], case["channels"], *case["size"]


def op(name):
    return getattr(importlib.import_module(f"fastdiff.kernels.{name}"), name)


def keep(t, device):
    """A copy on the device with the same strides, gaps included."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def in_place(step, reference, device, tensors, rest, sums=1):
    """Runs an op that writes into its arguments on the kernel, plainly and in float64, and compares all of them."""

    def run(run_step, to, on):
        moved = [None if t is None else to(t) for t in tensors]
        run_step(*moved, *(r.to(on) if isinstance(r, torch.Tensor) else r for r in rest(to)))
        return [None if t is None else t.cpu() for t in moved]

    ours = run(step, lambda t: keep(t, device), device)
    plain, truth = run(reference, lambda t: keep(t, "cpu"), "cpu"), run(reference, lambda t: t.double(), "cpu")
    for i, (a, p, t) in enumerate(zip(ours, plain, truth, strict=True)):
        if a is not None and a.numel():
            check(f"argument {i}", a, p, t, sums)


def images(case, layout, dtype=torch.float32):
    return lay(torch.randn(shape(case)).to(dtype), layout)


@pytest.mark.parametrize("case", cases(TWO))
def test_denoise_step(device, case):
    """Rows: x, F and a history; these and both noises, saves x; a saved x and clipped D, saves D."""
    torch.manual_seed(0)
    coefficients = torch.randn(3, len(C))
    coefficients[0, [C.N1, C.N2, C.N_V]] = coefficients[2, [C.N1, C.N2, C.N_V]] = 0
    codes = torch.zeros(3, len(K), dtype=torch.int32)
    codes[:, K.SAVE_X], codes[:, K.SAVE_D] = torch.tensor([0, 1, 0]), torch.tensor([-1, -1, 1])
    codes[:, K.DRAW1], codes[:, K.DRAW2] = 3, 4
    x, saved = images(case, case["layout"]), images(case, case["layout"])
    history = lay(torch.randn(2, *shape(case)), case["layout"])
    F, net_in = images(case, case["net_layout"], case["dtype"]), images(case, case["net_layout"], case["dtype"])
    seeds, row = seed_tensor(range(case["batch"])), torch.tensor([case["row"]])
    tensors = [x, F, saved, history, net_in]
    in_place(op("denoise_step"), denoise_step_reference, device, tensors, lambda to: (seeds, to(coefficients), codes, row))


@pytest.mark.parametrize("case", cases(TWO))
def test_langevin_step(device, case):
    torch.manual_seed(0)
    coefficients = torch.tensor([[-0.3, 0.8, 0.05, 0.9, 0.0], [0.0, -3.0, 0.0512, 0.4, 0.0], [0.4, 1.5, 0.1, 1.1, 0.2]])
    draws, row = torch.tensor([7, -1, 8], dtype=torch.int32), torch.tensor([case["row"]])
    x, mean = images(case, case["layout"]), images(case, case["layout"])
    F, net_in = images(case, case["net_layout"], case["dtype"]), images(case, case["net_layout"], case["dtype"])
    rest = seed_tensor(range(case["batch"])), draws, row, int(list(Norms)[case["row"] % len(Norms)])

    def tail(to):
        return rest[0], to(coefficients), *rest[1:]

    in_place(op("langevin_step"), langevin_step_reference, device, [x, F, net_in, mean], tail, sums=max(8, elements(case)))


@pytest.mark.parametrize("case", cases(FORMS))
def test_add_noise(device, case):
    torch.manual_seed(0)
    x, forms = images(case, case["layout"], case["dtype"]), torch.randn(case["batch"], case["forms"], 2)
    seeds = seed_tensor(range(case["batch"]))
    made = op("add_noise")(keep(x, device), seeds.to(device), forms.to(device), 1, 2).cpu()
    plain = add_noise_reference(x, seeds, forms, 1, 2)
    check("out", made, plain, add_noise_reference(x.double(), seeds, forms.double(), 1, 2))


@pytest.mark.parametrize("case", cases(FILTERS))
def test_resample(device, case):
    torch.manual_seed(0)
    x, taps = images(case, case["layout"], case["dtype"]), torch.randn(case["taps"])
    (up, down), (h, w) = case["filter"], case["size"]
    rest = up, down, case["pad"], -(-h * up // down), -(-w * up // down)
    made = op("resample")(keep(x, device), taps.to(device), *rest).cpu()
    truth = resample_reference(x.double(), taps.double(), *rest)
    check("y", made, resample_reference(x, taps, *rest), truth, case["taps"] ** 2)


def divides(case):
    groups = case["channels"] if case["groups"] == "C" else case["groups"]
    return case["channels"] % groups == 0 and case["channels"] % case["heads"] == 0


def products(case):
    """A program holds a row of scores of one head: wide heads are what the interpreter takes longest for."""
    return case["batch"] * case["channels"] ** 2 // case["heads"] * case["size"][0] * case["size"][1]


@pytest.mark.parametrize("case", cases(ATTENTION, 2**17, 2**19, divides, products))
def test_group_norm_attention(device, case):
    torch.manual_seed(0)
    c, dtype = case["channels"], case["dtype"]
    groups, heads = c if case["groups"] == "C" else case["groups"], case["heads"]
    qkv, out = (torch.randn(3 * c, c) * c**-0.5).to(dtype), (torch.randn(c, c) * c**-0.5).to(dtype)
    qkv_bias, out_bias = (torch.randn(3 * c), torch.randn(c)) if case["biases"] else (None, None)
    norm = [1 + torch.randn(c) / 4, torch.randn(c), groups, 1e-5]
    args = [lay((2 * torch.randn(shape(case)) + 5).to(dtype), case["layout"]), *norm]
    args += [qkv, qkv_bias, out, out_bias, heads, (c / heads) ** -0.5, 0.7, None]
    y, stats = op("group_norm_attention")(*[keep(a, device) if isinstance(a, torch.Tensor) else a for a in args])
    plain, plain_stats = attention_reference(*args)
    truth, true_stats = attention_reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    terms = max(1, c // groups * case["size"][0] * case["size"][1])
    check("stats", stats.cpu(), plain_stats, true_stats, terms)
    # One group of one element has no variance: rounding of x is magnified by 1/sqrt(eps), through two products.
    smallest = float(true_stats[..., 1].min()) if true_stats.numel() else 1.0
    more = 64 * torch.finfo(torch.float32).eps * (smallest + 1e-5) ** -0.5
    check("y", y.cpu(), plain, truth, terms + c, more)

"""group_norm_silu against PyTorch's group_norm and silu: forward and backward apart, at the U-Nets' shapes.

Traffic: forward x read and y written; backward x and dy read, dx written. On CPUs the exponential bounds the forward pass:
FLOOR_NS an element and core, measured with an AVX-512 silu whose data stay in L1; the last test prints the share.
"""

import functools

import pytest
import torch
from harness import with_full
from torch._functorch import config as functorch_config
from torch.nn import functional

from fastdiff import ops

functorch_config.donated_buffer = False  # graphs are kept for the next pass

FLOOR_NS = 0.28
# C, H = W: levels of the DDPM CIFAR-10 net (128, 256), of ADM's ImageNet-64 net (192 ... 768), of a wide 32 x 32 one
SHAPES = [(128, 32), (256, 32), (256, 16), (256, 8), (512, 8), (192, 64), (384, 32), (576, 16), (768, 8)]
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
CASES = [
    (n, c, size, dtype, layout)
    for c, size in SHAPES
    for n in (1, 8)
    for dtype in (torch.float32, torch.bfloat16)
    for layout in LAYOUTS
]
USUAL = [
    (8, 128, 32, torch.float32, "nhwc"),
    (8, 128, 32, torch.float32, "nchw"),
    (8, 256, 16, torch.bfloat16, "nhwc"),
    (1, 256, 32, torch.bfloat16, "nhwc"),
    (8, 192, 64, torch.bfloat16, "nhwc"),
]


def name_of(case) -> str:
    n, c, size, dtype, layout = case
    return f"{n}x{c}x{size}x{size} {str(dtype)[6:]} {layout}"


def tensors(case, device):
    n, c, size, dtype, layout = case
    x = torch.randn(n, c, size, size, device=device).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return x, torch.randn(c, device=device), torch.randn(c, device=device)


def plain(x, weight, bias):
    return functional.silu(functional.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype), 1e-6))


def ours(x, weight, bias):
    return ops.group_norm_silu(x, weight, bias, 32, 1e-6)


def within(got, theirs, truth):
    """Twice the error of plain PyTorch at this dtype, and a floor of one rounding of the largest value."""
    floor = torch.finfo(got.dtype).eps * float(truth.abs().max())
    error = float((got.double() - truth).abs().max())
    assert error <= 2 * float((theirs.double() - truth).abs().max()) + floor, error


@pytest.mark.parametrize("case", with_full(CASES, USUAL), ids=name_of)
def test_forward(compare, device, missing, case):
    x, weight, bias = tensors(case, device)
    compiled = torch.compile(plain)
    variants = {"fastdiff": lambda: ours(x, weight, bias), "pytorch": lambda: plain(x, weight, bias)}
    variants["compile"] = lambda: compiled(x, weight, bias)
    skipped = {}
    if device == "cuda" and case[4] == "nhwc":
        if (reason := missing("sglang")) is None:
            try:
                from sglang.jit_kernel.diffusion.triton.group_norm_silu import group_norm_silu as theirs
            except ImportError as error:
                reason = f"its kernel cannot be imported: {error}"
            else:
                variants["sglang"] = lambda: theirs(x, weight.to(x.dtype), bias.to(x.dtype), 32, 1e-6)
        if reason:
            skipped["sglang"] = reason

    def check():
        truth = plain(x.double(), weight.double(), bias.double())
        within(ours(x, weight, bias), plain(x, weight, bias), truth)

    with torch.no_grad():
        compare("group_norm_silu", name_of(case), variants, check, moved=2 * x.nbytes, skipped=skipped)


@pytest.mark.parametrize("case", with_full(CASES, USUAL), ids=name_of)
def test_backward(compare, device, case):
    """The backward pass alone: the graph is built once, and kept."""
    inputs = [t.requires_grad_() for t in tensors(case, device)]
    dy = torch.randn_like(inputs[0])
    made = {"fastdiff": ours(*inputs), "pytorch": plain(*inputs)}

    def gradients(name):
        return lambda: torch.autograd.grad(made[name], inputs, dy, retain_graph=True)

    def check():
        exact = [t.detach().double().requires_grad_() for t in inputs]
        truth = torch.autograd.grad(plain(*exact), exact, dy.double())[0]
        within(gradients("fastdiff")()[0], gradients("pytorch")()[0], truth)

    variants = {name: gradients(name) for name in made}
    compiled = functools.cache(lambda: torch.compile(plain)(*inputs))
    variants["compile"] = lambda: torch.autograd.grad(compiled(), inputs, dy, retain_graph=True)
    moved = 3 * inputs[0].nbytes
    compare("group_norm_silu", name_of(case) + " bwd", variants, check, moved=moved)


@pytest.mark.full
def test_exponential_floor(device, timed):
    """What the forward pass reaches of FLOOR_NS, in per cent, per element and core."""
    if device != "cpu":
        pytest.skip("of the CPU kernels; on GPUs the roof is the memory's")
    cores = torch.get_num_threads()
    print(f"\n{'':44}{'ns/element/core':>16}{'% of floor':>12}")
    for case in CASES:
        inputs = tensors(case, device)
        with torch.no_grad():
            seconds = timed({"fastdiff": lambda inputs=inputs: ours(*inputs)})["fastdiff"]
        busy = seconds * cores / inputs[0].numel() * 1e9
        print(f"{name_of(case):<44}{busy:>16.3f}{100 * FLOOR_NS / busy:>12.0f}")

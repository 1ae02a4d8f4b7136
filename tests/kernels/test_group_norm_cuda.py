"""The CUDA C++ group_norm_silu without a GPU: its phases compiled for the host and run thread by thread, and its plans."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from kernel_checks import check, lay

from fastdiff.ops.group_norm_silu import reference

ROOT = Path(__file__).parents[2]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
H200, A100 = (132, 232448, 8), (108, 166912, 1)  # multiprocessors, bytes of shared memory a block, blocks a cluster
PLAN = ("width", "slices", "per", "ranks", "rows", "slots", "shared")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here")
    out = tmp_path_factory.mktemp("host") / "norm.so"
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, Path(__file__).with_name("group_norm_host.cpp"), "-o", out], check=True)
    return ctypes.CDLL(str(out))


def run(library, args, device, y=None):
    """(y, stats, plan) of the emulated kernel; y None where the kernel leaves the case to Triton."""
    x, weight, bias, groups, eps, add, scale, shift, stats, silu = args
    n, c, s = *x.shape[:2], x.shape[2:].numel()
    y = torch.full_like(x, float("nan")) if y is None else y
    kept = torch.full((n, groups, 2), float("nan")) if stats is None else stats.clone()
    parameters = [weight, bias, add, scale, shift]
    pointers = (ctypes.c_void_p * 5)(*(None if t is None else t.data_ptr() for t in parameters))
    types = (ctypes.c_int * 5)(*(0 if t is None else CODES[t.dtype] for t in parameters))
    sizes = (ctypes.c_int64 * 8)(n, c, s, groups, x.stride(0), x.stride(-1), y.stride(0), y.stride(-1))
    plan = (ctypes.c_int * len(PLAN))()
    failed = library.group_norm_on_host(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), sizes, CODES[x.dtype], ctypes.c_float(eps), silu,
        stats is not None, pointers, types, ctypes.c_void_p(kept.data_ptr()), (ctypes.c_int * 3)(*device), plan,
    )  # fmt: skip
    assert not failed, "a block wrote past its shared memory"
    plan = dict(zip(PLAN, plan, strict=True))
    return (y if plan["width"] else None), kept, plan


def arguments(n, c, groups, height, width, dtype, optional=True, silu=True, mean=5.0, parameters=torch.float32):
    torch.manual_seed(0)
    x = lay((2 * torch.randn(n, c, height, width) + mean).to(dtype), "channels_last")
    extras = [torch.randn(n, c).to(parameters) if optional else None for _ in range(3)]
    return [x, torch.randn(c).to(parameters), torch.randn(c).to(parameters), groups, 1e-5, *extras, None, silu]


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


# Groups of 4, 8, 6, 18, 42 and 3 channels, one channel, all channels; one pixel, odd sides, more ranks than rows of threads.
SHAPES = (
    (2, 128, 32, 16, 16),
    (1, 256, 32, 32, 32),
    (1, 192, 32, 64, 64),
    (2, 576, 32, 8, 8),
    (1, 1344, 32, 9, 7),
    (3, 96, 32, 5, 3),
    (2, 64, 64, 7, 5),
    (1, 320, 1, 8, 8),
    (2, 64, 4, 1, 2),
    (1, 768, 16, 1, 3),
    (1, 32, 4, 64, 65),
)


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values(library, dtype, device):
    ranks = set()
    for i, shape in enumerate(SHAPES):
        args = arguments(*shape, dtype, optional=i % 3 != 1, silu=i % 4 != 3, parameters=(torch.float32, dtype)[i % 2])
        y, stats, plan = run(library, args, device)
        if y is None:  # too large for one block without clusters
            assert device is A100 and shape[-1] >= 64
            continue
        ranks.add(plan["ranks"])
        (plain, plain_stats), (truth, true_stats) = reference(*args), reference(*wide(args))
        terms = args[0][0].numel() // args[3]
        check(f"y {shape}", y, plain, truth, terms)
        check(f"stats {shape}", stats, plain_stats, true_stats, terms)
        args[8] = plain_stats
        check(f"y, stats given {shape}", run(library, args, device)[0], plain, truth, terms)
    assert ranks == ({1, 8} | ranks if device is H200 else {1})


@pytest.mark.parametrize("mean, std", [(1e4, 1.0), (-300.0, 0.01)])
def test_images_far_from_zero(library, mean, std):
    x = lay((torch.randn(1, 64, 24, 24).double() * std + mean).float(), "channels_last")
    one, zero = torch.ones(64), torch.zeros(64)
    for add in (None, torch.randn(1, 64) * std):
        args = [x, one, zero, 8, 0.0, add, None, None, None, True]
        y, stats, _ = run(library, args, H200)
        (plain, _), (truth, true_stats) = reference(*args), reference(*wide(args))
        check("y", y, plain, truth, 64)
        relative = ((stats[..., 1] - true_stats[..., 1]) / true_stats[..., 1]).abs().max().item()
        assert relative <= 16 * torch.finfo(torch.float32).eps, relative


def test_pixels_with_gaps(library):
    args = arguments(2, 64, 8, 6, 7, torch.bfloat16)
    x = torch.cat((args[0], args[0]), 1).contiguous(memory_format=torch.channels_last)[:, :64]
    y, _, _ = run(library, [x, *args[1:]], H200, y=torch.full_like(args[0], float("nan")))
    assert torch.equal(y, run(library, args, H200)[0])


def plan_of(library, n, c, side, dtype, device):
    sizes = (ctypes.c_int64 * 8)(n, c, side * side, 32)
    plan = (ctypes.c_int * len(PLAN))()
    library.plan_on_host(sizes, CODES[dtype], (ctypes.c_int * 3)(*device), plan)
    return dict(zip(PLAN, plan, strict=True))


@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_plans_cover_the_networks(library, device):
    """Every shape of the U-Nets has a plan on sm_90; batch 1 uses a third of the machine unless a thread has two vectors.

    Without clusters, slices of 32 x 32 and more may not fit, and go to Triton.
    """
    for c in (128, 192, 256, 320, 384, 512, 576, 768, 1024, 1152):
        for side in (4, 8, 16, 32, 64):
            for n in (1, 8):
                plan = plan_of(library, n, c, side, torch.bfloat16, device)
                assert plan["width"] or (device is A100 and side >= 32), (c, side, n)
                if plan["width"]:
                    assert plan["shared"] <= device[1] and plan["ranks"] <= device[2]
                    assert plan["width"] % 8 == 0 and plan["width"] % (c // 32) == 0
                    assert plan["rows"] * plan["ranks"] >= side**2 and plan["slices"] * plan["width"] >= c
                if device is H200 and side >= 32 and n == 1:
                    assert plan["slices"] * plan["ranks"] >= 132 / 3 or plan["slots"] <= 2, (c, side, plan)

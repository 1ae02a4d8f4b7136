"""resample against PyTorch's pooling, interpolation and depthwise convolutions. Traffic: x read, y written."""

import pytest
import torch
from harness import with_full
from torch.nn import functional

from fastdiff import ops

NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES = [  # N, C, H = W, dtype, layout, taps, "up" or "down": levels of EDM's DDPM++ and NCSN++ nets and of ADM's
    (8, 256, 16, torch.float32, NHWC, 2, "up"),
    (8, 256, 32, torch.float32, NHWC, 2, "down"),
    (8, 256, 16, torch.float32, NHWC, 4, "up"),
    (8, 256, 32, torch.float32, NHWC, 4, "down"),
    (4, 192, 64, torch.bfloat16, NHWC, 2, "down"),
    (8, 256, 32, torch.bfloat16, NHWC, 4, "down"),
    (8, 256, 16, torch.bfloat16, NHWC, 4, "up"),
    (8, 256, 16, torch.float32, NCHW, 2, "up"),
    (8, 256, 32, torch.float32, NCHW, 2, "down"),
    (8, 256, 16, torch.float32, NCHW, 4, "up"),
    (8, 256, 32, torch.float32, NCHW, 4, "down"),
    (8, 256, 32, torch.bfloat16, NCHW, 4, "down"),
    (8, 3, 256, torch.float32, NCHW, 4, "down"),
]


def name_of(case) -> str:
    n, c, size, dtype, layout, count, change = case
    return f"{n}x{c}x{size}x{size} {str(dtype)[6:]} {'nhwc' if layout is NHWC else 'nchw'} {count} taps {change}"


def peer(count, change, channels, taps):
    """The fastest plain PyTorch: pooling or nearest neighbour for a box, else a depthwise convolution."""
    if count == 2:
        return {
            "up": lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"),
            "down": lambda x: functional.avg_pool2d(x, 2),
        }[change]
    kernel = torch.outer(taps, taps)[None, None].repeat(channels, 1, 1, 1)
    convolve = functional.conv_transpose2d if change == "up" else functional.conv2d
    return lambda x: convolve(x, kernel.to(x.dtype), stride=2, padding=1, groups=channels)


@pytest.mark.parametrize("case", with_full(CASES, CASES[::3]), ids=name_of)
def test_resample(compare, device, case):
    n, c, size, dtype, layout, count, change = case
    x = torch.randn(n, c, size, size, device=device).to(dtype).contiguous(memory_format=layout)
    taps = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[count], device=device)
    taps = taps * ((2 if change == "up" else 1) / taps.sum())
    plain = peer(count, change, c, taps)
    exact = peer(count, change, c, taps.double())
    compiled = torch.compile(plain)
    ratio = {"up": {"up": 2}, "down": {"down": 2}}[change]
    pad = ops.resample_pads(count, **ratio)

    def ours(x):
        return ops.resample(x, taps, **ratio, pad=pad)

    def check():
        truth = exact(x.double())
        floor = torch.finfo(dtype).eps * float(truth.abs().max())
        theirs = float((plain(x).double() - truth).abs().max())
        assert float((ours(x).double() - truth).abs().max()) <= 2 * theirs + floor

    variants = {"fastdiff": lambda: ours(x), "pytorch": lambda: plain(x), "compile": lambda: compiled(x)}
    compare("resample", name_of(case), variants, check, moved=x.nbytes + ours(x).nbytes)

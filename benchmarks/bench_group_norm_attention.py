"""group_norm_attention against PyTorch's group_norm, 1x1 convolutions and scaled_dot_product_attention, eager and compiled.

Work: 8 N S C^2 operations in the projections and 4 N S^2 C in the attention, S = H W pixels, printed in each case's name in
units of 10^9: products bound the op on every device. Traffic: x read and y written, weights once, scores never.
On GPUs, channels-last, the forms that `fastdiff.compile` chooses from are peers too, "sdpa" and the name of a back end.
"""

import pytest
import torch
from harness import with_full
from torch.nn import functional

from fastdiff import ops
from fastdiff.compile.attend import BACKENDS, LibraryAttention

CASES = [  # N, C, H = W, heads: DDPM's and EDM's 16x16 (one head), ADM's 32x32 to 8x8 (64 channels a head), batch 1 included
    (1, 128, 16, 1),
    (1, 256, 16, 1),
    (8, 256, 16, 1),
    (8, 256, 16, 4),
    (1, 256, 32, 4),
    (8, 128, 32, 1),
    (1, 512, 8, 8),
    (8, 512, 8, 8),
]
USUAL = [(1, 256, 16, 1), (8, 256, 16, 4)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def name_of(case) -> str:
    n, c, size, heads = case
    work = 8 * n * size**2 * c**2 + 4 * n * size**4 * c
    return f"{n}x{c}x{size}x{size} {heads}h {work / 1e9:.2f}G"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", with_full(CASES, USUAL), ids=name_of)
def test_group_norm_attention(compare, device, case, dtype, layout):
    n, c, size, heads = case
    form = LAYOUTS[layout]
    x = torch.randn(n, c, size, size, device=device).to(dtype).contiguous(memory_format=form)
    w, b, out_bias = (torch.randn(c, device=device).to(dtype) for _ in range(3))
    qkv, qkv_bias = (torch.randn(3 * c, c, device=device) * c**-0.5).to(dtype), torch.randn(3 * c, device=device).to(dtype)
    out = (torch.randn(c, c, device=device) * c**-0.5).to(dtype)
    kernels = [t[..., None, None].contiguous(memory_format=form) for t in (qkv, out)]
    parameters = (w, b, kernels[0], qkv_bias, kernels[1], out_bias)

    def plain(x, w, b, qkv, qkv_bias, out, out_bias):
        h = functional.conv2d(functional.group_norm(x, 32, w, b, 1e-6), qkv, qkv_bias)
        q, k, v = h.reshape(n, 3, heads, c // heads, size * size).transpose(-1, -2).unbind(1)
        a = functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)
        return x + functional.conv2d(a, out, out_bias)

    compiled = torch.compile(plain)

    def by(backend):
        library = LibraryAttention(backend, (qkv, qkv_bias), (out, out_bias), heads, 1.0)
        return library.serves(x) and (lambda x: library(x, ops.group_norm_silu(x, w, b, 32, 1e-6, silu=False)))

    def ours(x):
        return ops.group_norm_attention(x, w, b, 32, qkv, qkv_bias, out, out_bias, heads, 1e-6)

    @torch.inference_mode()
    def check():
        # twice the error of plain PyTorch at this dtype, and a floor of one rounding of the largest value
        truth = plain(x.double(), *(p.double() for p in parameters))
        floor = torch.finfo(dtype).eps * float(truth.abs().max())
        theirs = float((plain(x, *parameters).double() - truth).abs().max())
        assert float((ours(x).double() - truth).abs().max()) <= 2 * theirs + floor

    variants = {"fastdiff": ours, "pytorch": lambda x: plain(x, *parameters), "compile": lambda x: compiled(x, *parameters)}
    forms = {f"sdpa {backend}": by(backend) for backend in BACKENDS} if device == "cuda" and layout == "nhwc" else {}
    variants |= {name: form for name, form in forms.items() if form}
    skipped = {name: "PyTorch would not take it here" for name, form in forms.items() if not form}
    variants = {name: torch.inference_mode()(lambda fn=fn: fn(x)) for name, fn in variants.items()}
    name = f"{name_of(case)} {str(dtype)[6:]} {layout}"
    compare("group_norm_attention", name, variants, check, images=n, skipped=skipped)

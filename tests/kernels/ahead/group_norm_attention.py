"""Head widths of the networks: 64 in several heads, 128 and 256 in one, and beyond; both layouts; float32 once."""

import torch

from fastdiff.kernels.group_norm_attention import group_norm_attention

ARCHITECTURES = (80, 90, 100)
NOISE = False
LAST = torch.channels_last


def cases(case):
    for name, (c, heads, size), dtype, form in (
        ("d=64, 4 heads bfloat16", (256, 4, 16), torch.bfloat16, LAST),
        ("d=128 bfloat16", (128, 1, 32), torch.bfloat16, torch.contiguous_format),
        ("d=256 bfloat16", (256, 1, 16), torch.bfloat16, LAST),
        ("d=256, 8x8 bfloat16", (256, 1, 8), torch.bfloat16, LAST),
        ("d=512 bfloat16", (512, 1, 8), torch.bfloat16, LAST),
        ("d=64 float32", (256, 4, 16), torch.float32, LAST),
        ("d=256 float32", (256, 1, 16), torch.float32, torch.contiguous_format),
    ):
        case(name)
        x = torch.empty(8, c, size, size, dtype=dtype).contiguous(memory_format=form)
        w, qkv, out = torch.empty(c), torch.empty(3 * c, c, dtype=dtype), torch.empty(c, c, dtype=dtype)
        group_norm_attention(x, w, w, 32, 1e-5, qkv, torch.empty(3 * c), out, w, heads, 0.1, 1.0, None)

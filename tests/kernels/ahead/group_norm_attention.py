import torch

from fastdiff.kernels.group_norm_attention import group_norm_attention

ARCHITECTURES = (80, 90, 100)
NOISE = False
NARROW = {
    "_partial stores": "it writes three statistics a group",
    "_statistics loads": "three statistics a group and chunk",
    "_statistics stores": "two statistics a group",
    "_project_in loads": "asynchronous 128-bit copies to shared memory, LDGSTS",
    "_project_in stores": "128 bits wide, after the loop",
    "_attend loads": "asynchronous 128-bit copies to shared memory, LDGSTS",
    "_attend stores": "128 bits wide, after the loop",
    "_project_out loads": "asynchronous 128-bit copies to shared memory, LDGSTS",
    "_project_out stores": "128 bits wide, after the loop",
}


def cases(case):
    # Heads of 64 and of a whole 256 channels, as in ADM and DDPM, at their sizes; float32, which has no tensor cores.
    for name, (c, heads, size), dtype, form in (
        ("d=64, 16x16 channels_last bfloat16", (256, 4, 16), torch.bfloat16, torch.channels_last),
        ("d=128, 32x32 bfloat16", (128, 1, 32), torch.bfloat16, torch.contiguous_format),
        ("d=256, 8x8 channels_last bfloat16", (256, 1, 8), torch.bfloat16, torch.channels_last),
        ("d=256, 16x16 float32", (256, 1, 16), torch.float32, torch.contiguous_format),
    ):
        case(name)
        x = torch.empty(8, c, size, size, dtype=dtype).contiguous(memory_format=form)
        w, qkv, out = torch.empty(c), torch.empty(3 * c, c, dtype=dtype), torch.empty(c, c, dtype=dtype)
        group_norm_attention(x, w, w, 32, 1e-5, qkv, torch.empty(3 * c), out, w, heads, 0.1, 1.0, None)

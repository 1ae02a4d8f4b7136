import torch

from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.group_norm_silu_backward import group_norm_silu_backward

ARCHITECTURES = (80, 90, 100)
NOISE = False
NARROW = {
    "normalise loads": "CUDA C++: x comes by LDGSTS.E.BYPASS.128; what is loaded are statistics and parameters",
    "_whole loads, whole channels_last bfloat16, 18 a group": "a group's pixel is 36 bytes: 4 at a time are aligned",
    "_whole stores, whole channels_last bfloat16, 18 a group": "likewise",
    "_whole loads, whole channels_last float32, 42 a group": "a group's pixel is 168 bytes: 8 at a time are aligned",
    "_whole stores, whole channels_last float32, 42 a group": "likewise",
    "_partial stores": "it writes three statistics a group",
    "_sums stores": "it writes three sums a channel",
    "_fold loads": "tables of one number a channel",
    "_fold stores": "tables of one number a channel",
}

STACK = {
    "_sums, streamed channels_last bfloat16, 6 a group": (
        8,
        "for sm_100 ptxas stops at 128 registers, for two blocks at a time, and parks one word, before and after the loop",
    ),
}


def cases(case):
    # Slices on chip and streamed ones; groups of 6, 18 and 42 channels are the odd cases that vectorise worst.
    first, last = torch.contiguous_format, torch.channels_last
    for name, size, dtype, form, backward in (
        ("whole bfloat16", (2, 256, 16, 16), torch.bfloat16, first, False),
        ("whole channels_last bfloat16, 18 a group", (1, 576, 8, 8), torch.bfloat16, last, False),
        ("whole channels_last float32, 42 a group", (1, 1344, 8, 8), torch.float32, last, False),
        ("streamed float32", (1, 128, 64, 64), torch.float32, first, True),
        ("streamed channels_last bfloat16, 6 a group", (2, 192, 64, 64), torch.bfloat16, last, True),
    ):
        case(name)
        n, c = size[:2]
        x = torch.empty(size, dtype=dtype).contiguous(memory_format=form)
        w, nc = torch.empty(c), torch.empty(n, c)
        args = (x, w, w, 32, 1e-5, nc, nc, nc)
        group_norm_silu(*args, None, True)
        if backward:
            group_norm_silu_backward(x, *args, torch.empty(n, 32, 2), True)


def huge():
    x, w = torch.empty(1).expand(3, 2**16, 2**10, 2**6), torch.empty(2**16)
    group_norm_silu(x, w, w, 2, 1e-5, None, None, None, None, True)

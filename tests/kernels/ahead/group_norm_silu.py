import torch

from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.group_norm_silu_backward import group_norm_silu_backward

ARCHITECTURES = (90,)
NOISE = False
NARROW = {
    "_partial stores": "it writes three statistics a group",
    "_sums stores": "it writes three sums a channel",
    "_fold loads": "tables of one number a channel",
    "_fold stores": "tables of one number a channel",
}


def cases(case):
    # Slices on chip and streamed ones; 192 channels in 32 groups, six each, are the odd case that vectorises worst.
    for name, size, form in (
        ("whole bfloat16", (2, 256, 16, 16), torch.contiguous_format),
        ("whole channels_last bfloat16", (2, 192, 16, 16), torch.channels_last),
        ("streamed channels_last bfloat16", (2, 192, 64, 64), torch.channels_last),
    ):
        case(name)
        n, c = size[:2]
        x = torch.empty(size, dtype=torch.bfloat16).contiguous(memory_format=form)
        w, nc = torch.empty(c), torch.empty(n, c)
        args = (x, w, w, 32, 1e-5, nc, nc, nc)
        group_norm_silu(*args, None, True)
        if form is torch.channels_last:
            group_norm_silu_backward(x, *args, torch.empty(n, 32, 2), True)


def huge():
    x, w = torch.empty(1).expand(3, 2**16, 2**10, 2**6), torch.empty(2**16)
    group_norm_silu(x, w, w, 2, 1e-5, None, None, None, None, True)

import torch

from fastdiff.kernels.resample import resample

ARCHITECTURES = (80, 90, 100)
NOISE = False
NARROW = {"_resample_rows loads": "results beside each other come from every second or every half element"}


def cases(case):
    for name, dtype, form in (
        ("channels_last bfloat16", torch.bfloat16, torch.channels_last),
        ("float32", torch.float32, torch.contiguous_format),
    ):
        x, taps = torch.empty(2, 256, 16, 16, dtype=dtype).contiguous(memory_format=form), torch.empty(4)
        case(f"{name} doubled")
        resample(x, taps, 2, 1, 2, 32, 32)
        case(f"{name} halved")
        resample(x, taps, 1, 2, 1, 8, 8)


def huge():
    x = torch.empty(1).expand(3, 2**16, 2**10, 2**6)
    resample(x, torch.empty(4), 2, 1, 2, 2**11, 2**7)

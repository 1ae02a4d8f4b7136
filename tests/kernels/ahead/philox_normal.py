import torch

from fastdiff.kernels.philox_normal import philox_normal

ARCHITECTURES = (80, 90, 100)
NOISE = True
NARROW = {"_philox_normal loads": "it reads nothing but seeds", "fill loads": "likewise, in CUDA C++"}


def cases(case):
    for dtype in (torch.float32, torch.bfloat16):
        case(f"contiguous {str(dtype)[6:]}")
        philox_normal(torch.arange(2), 0, 0, (3, 32, 32), dtype)

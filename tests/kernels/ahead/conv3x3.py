import torch

from fastdiff.kernels.conv3x3 import conv3x3
from fastdiff.ops._fp8 import packed_shape, served

ARCHITECTURES = (90, 100)  # sm_80 multiplies no E4M3
NOISE = False
NARROW = {
    "_apply stores, fp8 144 to 80 channels_last bfloat16": "eight bytes of E4M3 where sixteen of bfloat16 were loaded",
}


def cases(case):
    if torch.cuda.is_available() and not served(torch.device("cuda")):
        return
    # DDPM's and EDM's groups, with moments in the epilogue; ADM's of 6 channels and blocks of 64, without; blocks cut short.
    for name, (n, i, o, size), groups in (
        ("fp8 256 to 256 channels_last bfloat16", (2, 256, 256, 32), 32),
        ("fp8 192 to 192 channels_last bfloat16", (2, 192, 192, 64), 32),
        ("fp8 144 to 80 channels_last bfloat16", (2, 144, 80, 16), 10),
    ):
        case(name)
        x, y = (torch.empty(n, size, size, c, dtype=torch.bfloat16).permute(0, 3, 1, 2) for c in (i, o))
        weight = torch.empty(1).expand(o, i, 3, 3)
        packed = torch.empty(packed_shape(weight), dtype=torch.uint8).view(torch.float8_e4m3fn)
        w, nc = torch.empty(i), torch.empty(n, i)
        norm = (w, w, 4, 1e-5, None, nc, nc, torch.empty(n, 4, 2), True)
        conv3x3(x, weight, torch.empty(n, o), *norm, y, 0.7, groups, packed, "fp8")


def huge():
    x, w = torch.empty(1, dtype=torch.bfloat16).expand(2**11, 2**11, 32, 32), torch.empty(2**11)
    weight = torch.empty(1).expand(2**11, 2**11, 3, 3)
    packed = torch.zeros(packed_shape(weight), dtype=torch.uint8).view(torch.float8_e4m3fn)
    conv3x3(x, weight, None, w, w, 2, 1e-5, None, None, None, None, True, None, 1.0, 0, packed, "fp8")

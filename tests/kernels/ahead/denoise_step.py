import torch

from fastdiff.kernels.denoise_step import denoise_step
from fastdiff.ops.denoise_step import C, K

ARCHITECTURES = (80, 90, 100)
NOISE = True
STACK = {"_denoise_step": (8, "for sm_90 ptxas stops at 80 registers and parks one 32-bit word, once")}


def cases(case):
    tables = (torch.zeros(3, len(C)), torch.zeros(3, len(K), dtype=torch.int32), torch.tensor([0]))
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(2, 32, 32, 32).contiguous(memory_format=form)
        F = x.bfloat16()
        last = form is torch.channels_last
        history = torch.empty(2, 2, 32, 32, 32).permute(0, 1, 4, 2, 3) if last else torch.stack((x, x))
        case(str(form)[6:])
        denoise_step(x, F, x.clone(), history, F.clone(), torch.arange(2), *tables)
        case(f"{str(form)[6:]} guided learned")
        twice = torch.cat((F, F)).contiguous(memory_format=form)
        denoise_step(x, F, x.clone(), history, twice, torch.arange(2), *tables, F.clone(), torch.ones(1), F.clone())

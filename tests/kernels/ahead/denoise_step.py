import torch

from fastdiff.kernels.denoise_step import denoise_step

ARCHITECTURES = (80, 90, 100)
NOISE = True
STACK = {"_denoise_step": (8, "Triton's build for sm_90 keeps 8 bytes; `ptxas -v` says no spill")}


def cases(case):
    for form in (torch.contiguous_format, torch.channels_last):
        case(str(form)[6:])
        x = torch.empty(2, 32, 32, 32).contiguous(memory_format=form)
        last = form is torch.channels_last
        history = torch.empty(2, 2, 32, 32, 32).permute(0, 1, 4, 2, 3) if last else torch.stack((x, x))
        codes, row = torch.zeros(3, 5, dtype=torch.int32), torch.tensor([0])
        tables = (torch.zeros(3, 14), codes, row)
        denoise_step(x, x.bfloat16(), x.clone(), history, x.bfloat16(), torch.arange(2), *tables)

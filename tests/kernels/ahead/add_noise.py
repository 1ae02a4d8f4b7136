import torch

from fastdiff.kernels.add_noise import add_noise

ARCHITECTURES = (80, 90, 100)
NOISE = True


def cases(case):
    for form in (torch.contiguous_format, torch.channels_last):
        case(str(form)[6:])
        x = torch.empty(2, 32, 32, 32).contiguous(memory_format=form)
        add_noise(x, torch.arange(2), torch.zeros(2, 2, 2), 0, 2)


def huge():
    x = torch.empty(1).expand(3, 2**16, 2**10, 2**6)
    add_noise(x, torch.arange(3), torch.zeros(3, 2, 2), 0, 2)

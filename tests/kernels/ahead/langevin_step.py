"""langevin_step: its three kernels in both layouts, with and without the mean."""

import torch

from fastdiff.kernels.langevin_step import langevin_step
from fastdiff.ops.langevin_step import L, Norms

ARCHITECTURES = (80, 90, 100)
NOISE = True
NARROW = {
    "_sums stores": "it writes two sums",
    "_mean_ratio loads": "partial sums, a few numbers a sample",
    "_mean_ratio stores": "one number",
}


def cases(case):
    seeds, draws, row = torch.arange(2), torch.zeros(3, dtype=torch.int32), torch.tensor([0])
    table = torch.zeros(3, len(L))
    for name, form in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        x = torch.empty(2, 32, 32, 32).contiguous(memory_format=form)
        case(name)
        langevin_step(x, x.bfloat16(), x.bfloat16(), None, seeds, table, draws, row, Norms.SAMPLE)
    case("given, with the mean")
    langevin_step(x, x.bfloat16(), x.bfloat16(), x.clone(), seeds, table, draws, row, Norms.GIVEN)
    case("batch")
    langevin_step(x, x.bfloat16(), x.bfloat16(), x.clone(), seeds, table, draws, row, Norms.BATCH)

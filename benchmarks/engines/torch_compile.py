"""diffusers' documented recipe: channels_last, fused qkv, torch.compile with its inductor flags; weights frozen on CPUs."""

import torch

from engines.case import Case
from engines.torch_eager import forward_of


def prepare(case: Case, precision: str):
    from torch._inductor import config

    config.conv_1x1_as_mm = config.coordinate_descent_tuning = config.coordinate_descent_check_all_directions = True
    config.epilogue_fusion = False
    config.freezing = True  # without it bfloat16 convolutions on CPUs are 26 times slower

    def wrap(module):
        module = module.to(memory_format=torch.channels_last)
        if hasattr(module, "fuse_qkv_projections"):
            module.fuse_qkv_projections()
        return torch.compile(module, mode="max-autotune", fullgraph=True)

    forward = forward_of(case, precision, wrap)
    forward(case.x(), 0)
    return forward

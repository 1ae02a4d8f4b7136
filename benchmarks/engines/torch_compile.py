"""diffusers' documented recipe: channels_last, fused qkv, torch.compile with its inductor flags; weights frozen on CPUs.

max-autotune gets a budget of seconds, FASTDIFF_AUTOTUNE (0 goes without): where it does not finish, mode="default" does,
with the same weights frozen, and the row says so.
"""

import os
import signal

import torch

from engines.case import Case
from engines.torch_eager import forward_of

BUDGET = 120  # seconds


class OverBudget(BaseException):
    """Not an Exception, which Inductor would wrap."""


def prepare(case: Case, precision: str):
    from torch._inductor import config

    config.freezing = True  # without it bfloat16 convolutions on CPUs are 26 times slower
    budget = int(os.environ.get("FASTDIFF_AUTOTUNE", BUDGET))
    if budget:
        try:
            return _within(budget, lambda: _compiled(case, precision, "max-autotune"))
        except OverBudget:
            torch._dynamo.reset()
    forward = _compiled(case, precision, "default")
    forward.note = f'mode="default": max-autotune was not done in {budget} s' if budget else 'mode="default"'
    return forward


def _compiled(case: Case, precision: str, mode: str):
    from torch._inductor import config

    def wrap(module):
        module = module.to(memory_format=torch.channels_last)
        if hasattr(module, "fuse_qkv_projections"):
            module.fuse_qkv_projections()
        return torch.compile(module, mode=mode, fullgraph=True)

    tuned = mode == "max-autotune"
    names = ("conv_1x1_as_mm", "coordinate_descent_tuning", "coordinate_descent_check_all_directions")
    with config.patch({name: tuned for name in names} | {"epilogue_fusion": not tuned}):
        forward = forward_of(case, precision, wrap)
        forward(case.x(), 0)
    return forward


def _within(seconds: int, call):
    """call(), or OverBudget after so many seconds."""

    def stop(*given):
        raise OverBudget

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return call()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

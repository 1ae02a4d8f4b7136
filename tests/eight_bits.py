"""What a GPU computes by "fp8", on any machine: quality's cost can be known without one."""

import dataclasses
import sys

import torch

import fastdiff
from fastdiff.compile import program_of, steps
from fastdiff.ops.conv3x3 import composed

choose = sys.modules["fastdiff.compile.choose"]


def emulate(monkeypatch, every=False):
    """Let programs compute fp8 by the reference; every: in all convolutions behind a norm, whatever their size."""
    kernel = steps.CONV3X3
    monkeypatch.setattr(steps, "CONV3X3", lambda *args: (composed if args[-1] == "fp8" else kernel)(*args))
    if every:
        monkeypatch.setattr(choose, "takes_eight_bits", lambda step, program: step.norm is not None)


def fast_model(model):
    """The model as `fastdiff.compile(model, quality="fast")` makes it on a GPU, the library in all but eight bits."""
    library = {name: "library" for name, _ in model.network.named_modules()}
    program = program_of(model.network, torch.bfloat16, choices=library, size=model.shape[1:], fast=True)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)} | {"network": program}
    return fastdiff.Compiled(**fields, original=model.network, quality="fast")

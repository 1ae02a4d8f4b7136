"""Whole networks, one evaluation: the compiled program against the modules, plain PyTorch and torch.compile.

The peers of other projects take minutes to export and a process each: `python benchmarks/compare.py`.
"""

from pathlib import Path

import harness
import pytest
import torch
from engines.case import Case, plain_network

import fastdiff

CASES = [(net, batch) for net in ("ddpm-cifar10", "edm-cifar10", "adm-imagenet64") for batch in (1, 8)]
# Relative error of the output against float64: the promise of quality="lossless", and twice bfloat16's own.
ALLOWED = {"lossless": 2e-5, "high": 2.5e-2}


@pytest.mark.parametrize(
    "which", harness.with_full(CASES, [("ddpm-cifar10", 1)]), ids=lambda which: f"{which[0]}-{which[1]}"
)
@pytest.mark.parametrize("quality", ["lossless", "high"])
def test_unet(compare, device, which, quality):
    net, batch = which
    case = Case(net, batch, Path())
    model = case.model()
    model.network.to(device)
    dtype = {"lossless": torch.float32, "high": torch.bfloat16}[quality]
    fast = fastdiff.compile(model, batch=batch, quality=quality)
    plain = plain_network(case.network()).to(device)
    x, t, labels = case.x().to(device), torch.full((batch,), 500.0, device=device), case.labels()
    labels = None if labels is None else labels.to(device)
    extra = [] if labels is None else [labels]

    def under(network):
        def call():
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                return network(x, t, *extra)

        return call

    def check():
        with torch.inference_mode():
            one = [] if labels is None else [labels[:1]]
            truth = plain_network(case.network()).to(device).double()(x[:1].double(), t[:1].double(), *one)
        got = fast.network(x, t, *extra)[:1].double()
        assert (got - truth).norm() <= ALLOWED[quality] * truth.norm()

    channels_last = plain.to(memory_format=torch.channels_last)
    variants = {
        "fastdiff": lambda: fast.network(x, t, *extra),
        "pytorch": under(channels_last),
        "torch.compile": under(torch.compile(channels_last, fullgraph=True)),
        "fastdiff modules": under(model.network),
    }
    compare("unet", f"{net}, batch {batch}, {quality}", variants, check, flops=case.operations() * batch)

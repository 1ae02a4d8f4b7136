"""What the loop costs beside its network: memory, counted in every allocation, and calls of ops in a step."""

import json
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import Prediction, ops
from fastdiff.plan import execute
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules import DDPM, EDM, VE

SHAPE, BATCH = (3, 64, 64), 8
IMAGES = BATCH * 3 * 64 * 64 * 4  # bytes of a batch


class Net(torch.nn.Module):
    """A network whose own memory is 30 times its input's."""

    def forward(self, x, c_noise):
        return torch.tanh(x.repeat(1, 15, 1, 1)).mean(1, keepdim=True).expand_as(x).contiguous()


def peak(run, path):
    """The most bytes allocated at once, by whomever, while run() runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    recorded.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    most = total = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


CHAIN, SDES = {"ddpm", "ddim", "fast-ddpm"}, {"predictor-corrector", "ancestral"}


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "euler", "heun", "dpm-solver++3m", "unipc", "lms", "pndm", "restart", "predictor-corrector"]
)
def test_memory(name, tmp_path):
    """The network's peak plus as many images as the plan keeps estimates, and two."""
    schedule = DDPM() if name in CHAIN else VE() if name in SDES else EDM()
    nfe = {"pndm": 15, "restart": 13, "predictor-corrector": 10}.get(name, 9)
    plan = SAMPLERS[name](schedule, Prediction("edm"), nfe)
    net, seeds = Net(), ops.seed_tensor(range(BATCH))
    x, c_noise = torch.zeros(BATCH, *SHAPE).contiguous(memory_format=torch.channels_last), torch.zeros(BATCH)
    with torch.inference_mode():
        execute(plan, net, seeds, SHAPE)  # what libraries keep for good
        alone = peak(lambda: net(x, c_noise), tmp_path / "alone.json") + IMAGES  # and its input
        whole = peak(lambda: execute(plan, net, seeds, SHAPE), tmp_path / "whole.json")
    assert alone > 30 * IMAGES and whole > alone
    tables = 64 * 1024
    assert whole <= alone + (plan.slots + 2) * IMAGES + tables, (whole - alone) / IMAGES


class Calls(TorchDispatchMode):
    """Names of the ops called."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["ddpm", "unipc", "predictor-corrector"])
def test_calls(name):
    """A step beside the network: the row's time looked up, one fused op, the row advanced; nothing grows with the plan."""
    seeds, counts = ops.seed_tensor([0]), []
    for nfe in (10, 20):
        plan = SAMPLERS[name](VE() if name in SDES else EDM(), Prediction("edm"), nfe)
        with torch.inference_mode(), Calls() as calls:
            execute(plan, lambda x, t: x, seeds, (1, 4, 4))
        counts.append(calls.names)
    more = {op: (counts[1][op] - counts[0][op]) / 10 for op in counts[1] if counts[1][op] != counts[0][op]}
    fused = {op: n for op, n in more.items() if op.startswith("fastdiff")}
    assert sum(fused.values()) == 1
    # views (select, expand, slice, split) launch nothing on a GPU
    views = ("select", "expand", "slice", "split", "view", "unsqueeze", "alias", "detach")
    launched = {op: n for op, n in more.items() if not op.startswith("fastdiff") and not any(v in op for v in views)}
    assert sum(launched.values()) <= 2, launched

"""One evaluation with its update is one graph for every plan, whatever its length, seeds, labels and guidance weights."""

import numpy as np
import pytest
import torch
from tiny import tiny
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from fastdiff import Prediction, UNet, evaluation, ops
from fastdiff.plan import Loop, execute, prepare
from fastdiff.samplers import SAMPLERS
from fastdiff.schedules import DDPM, EDM, VE
from fastdiff.stepwise import Guidance

SHAPE = (1, 8, 8)
CHAIN = {"analytic-ddpm", "fast-ddpm", "lcm", "san-roman", "watson", "ddpm", "ddim"}
SDES = {"ancestral", "annealed-langevin", "euler-maruyama", "predictor-corrector", "reverse-diffusion"}
OPTIONS = {
    "analytic-ddpm": {"gamma": np.full(1000, 0.9)},
    "watson": {"mse": np.linspace(0.1, 1, 1000)},
    "heun": {"S_churn": 20.0},
    "san-roman": {"level": lambda x: torch.linspace(0.4, 0.6, len(x))},
}


def plan_of(name, nfe=None, **options):
    schedule = DDPM() if name in CHAIN else VE() if name in SDES else EDM()
    nfe = nfe or {"pndm": 21, "restart": 35}.get(name, 22 if name in ("predictor-corrector", "annealed-langevin") else 15)
    return SAMPLERS[name](schedule, Prediction("edm"), nfe, **OPTIONS.get(name, {}) | options)


class Net(torch.nn.Module):
    """A network of one layer, with labels."""

    def __init__(self, channels=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.of_label = torch.nn.Conv2d(1, channels, 3, padding=1), torch.nn.Embedding(4, 1)

    def forward(self, x, c_noise, labels):
        return torch.tanh(self.conv(x) + self.of_label(labels)[..., None, None] + c_noise.reshape(-1, 1, 1, 1))


@pytest.fixture
def compiled(monkeypatch):
    """The loop's rows compiled, each kind in one graph or not at all; .frame_count says how many graphs there are."""
    torch._dynamo.reset()
    counter = CompileCounter()
    for name in ("evaluation", "update", "correction"):
        whole = torch.compile(getattr(evaluation, name), backend=counter, fullgraph=True)
        monkeypatch.setattr(evaluation, name, whole)
    yield counter
    torch._dynamo.reset()


def run(plan, seeds=(1, 2), labels=(0, 1), weight=None, net=None):
    labels = torch.tensor(labels)
    guidance = None if weight is None else Guidance(torch.tensor([weight]), without=torch.full_like(labels, 3))
    with torch.inference_mode():
        return execute(plan, net or Net(), ops.seed_tensor(seeds), SHAPE, labels, guidance=guidance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_graph(name, monkeypatch, compiled):
    """As many graphs as there are kinds of rows: with an evaluation, without one, with a Langevin step."""
    plan, net = plan_of(name), Net()
    got = run(plan, net=net)
    kinds = {(row.evaluate, row.langevin is not None) for row in plan.rows}
    assert compiled.frame_count == len(kinds)
    run(plan, seeds=(7, 2**63), labels=(2, 2), net=net)
    assert compiled.frame_count == len(kinds), "another graph for other seeds or labels"
    monkeypatch.undo()
    assert torch.equal(got, run(plan, net=net))


def test_guidance_weights_are_no_constants(monkeypatch, compiled):
    plan, net = plan_of("heun"), Net()
    images = [run(plan, weight=w, net=net) for w in (1.5, 3.0, 7.0)]
    assert compiled.frame_count == 2  # Heun's churn is a row of its own
    assert not torch.equal(images[0], images[1])
    monkeypatch.undo()
    assert torch.equal(images[2], run(plan, weight=7.0, net=net))


def test_learned_variance(compiled):
    run(plan_of("ddpm", variance="learned"), net=Net(2))
    assert compiled.frame_count == 1


def begin(plan, net):
    """The first three rows."""
    labels, seeds = torch.tensor([0, 1]), ops.seed_tensor([1, 2])
    with torch.inference_mode():
        buffers = prepare(plan, seeds, SHAPE, torch.float32)
        loop = Loop(plan, net, seeds, labels, buffers, None, None, None)
        for i in range(3):
            loop.step(i)


def test_a_thousand_steps_are_no_more_than_ten(compiled):
    """Steps are rows of a table: one graph of as many operations; a table of another length makes it dynamic, once."""
    net, sizes = Net(), []
    for name, nfe in (("ddim", 10), ("ddpm", 1000)):
        torch._dynamo.reset()
        compiled.clear()
        begin(plan_of(name, nfe), net)
        assert compiled.frame_count == 1
        sizes.append(compiled.op_count)
    assert sizes[1] <= sizes[0]
    for nfe in (10, 50, 100, 250):
        begin(plan_of("ddpm", nfe), net)
    assert compiled.frame_count == 2


def test_unet(compiled):
    """All of the U-Net and the step are one graph; labels that the user leaves to the seeds are inputs like any other."""
    torch.manual_seed(0)
    net, plan = UNet(tiny(labels=4)).eval(), plan_of("ddim", 3)
    run(plan, net=net)
    run(plan, seeds=(5, 6), labels=(3, 1), net=net)
    assert compiled.frame_count == 1


@pytest.mark.slow
def test_generated_code(monkeypatch):
    """The same through Inductor: one graph, and the images of the loop that is not compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    torch.manual_seed(0)
    net, plan = UNet(tiny(labels=4)).eval(), plan_of("ddim", 4)
    expected = run(plan, net=net)
    monkeypatch.setattr(evaluation, "evaluation", torch.compile(evaluation.evaluation, backend=counter, fullgraph=True))
    # x is up to 4 deviations wide; generated code contracts multiplications and additions
    torch.testing.assert_close(run(plan, net=net), expected, rtol=0, atol=2e-5)
    run(plan, seeds=(5, 6), labels=(3, 1), net=net)
    assert counter.frame_count == 1
    torch._dynamo.reset()

"""quality="fast": which layers take eight bits, what that costs, and that nothing else ever does."""

import copy
import dataclasses
import sys

import pytest
import torch
from compiled_networks import inputs, model_of
from eight_bits import emulate
from tiny import awake, tiny

import fastdiff
from fastdiff import Model, Prediction, ops, schedules
from fastdiff.compile import automatic, program_of, steps

choose = sys.modules["fastdiff.compile.choose"]
CONFIG = tiny(
    resolution=32, channels=64, multipliers=(1, 1, 2), blocks=1, attention=(16,), groups=8, in_channels=3, out_channels=3
)


@pytest.fixture(scope="module", params=["add", "scale_shift"])
def network(request):
    return awake(dataclasses.replace(CONFIG, conditioning=request.param))


@pytest.fixture
def served(monkeypatch):
    """A CPU that says it has eight bits, and computes them by the reference."""
    real = ops.conv3x3_algorithms
    monkeypatch.setattr(ops, "conv3x3_algorithms", lambda *given: (*real(*given), "fp8"))
    emulate(monkeypatch)


def of_a_fast_program(network):
    library = {name: "library" for name, _ in network.named_modules()}
    return program_of(network, torch.bfloat16, choices=library, fast=True)


def test_the_layers_that_take_eight_bits(network):
    """A block's convolutions at 32 and 16, none at 8, not the first or last, nor those without a norm in front."""
    program = of_a_fast_program(network)
    chosen = {name for name, algorithm in program.algorithms.items() if algorithm == "fp8"}
    assert chosen == {
        step.name
        for step in program.convolutions
        if step.name.endswith((".conv0", ".conv1")) and program.sizes[step.name] >= (16, 16)
    }
    assert len(chosen) >= 8 and {program.algorithms[name] for name in ("conv_in", "conv_out")} == {"library"}
    assert any(program.sizes[name] == (8, 8) and name.endswith(".conv1") for name in set(program.algorithms) - chosen)
    for step in program.convolutions:
        assert (step.packed is not None and step.packed.dtype == torch.float8_e4m3fn) == (step.name in chosen)


def test_few_channels_stay_as_they_are():
    program = of_a_fast_program(awake(dataclasses.replace(CONFIG, channels=32, multipliers=(1, 2))))
    names = {name: a for name, a in program.algorithms.items() if name.endswith("conv1")}
    widths = {step.name: step.weight.shape[0] for step in program.convolutions}
    assert {a for name, a in names.items() if widths[name] < 64} == {"library"}
    assert "fp8" in {a for name, a in names.items() if widths[name] >= 64}


def test_the_error_is_that_of_eight_bits(network, monkeypatch):
    """Per layer E4M3's relative error is 0.026 for each operand (uniform in a binade: 2^-3 / sqrt(12) / 1.44), so 0.037."""
    emulate(monkeypatch)
    given = inputs(network.config, 2)
    library = {name: "library" for name, _ in network.named_modules()}
    with torch.inference_mode():
        truth = network(*given)
        eight, sixteen = of_a_fast_program(network)(*given), program_of(network, torch.bfloat16, choices=library)(*given)
    errors = [((y - truth).norm() / truth.norm()).item() for y in (eight, sixteen)]
    assert errors[1] < 0.02 < errors[0] < 0.2, errors


@pytest.mark.skipif(
    "fp8" not in ops.conv3x3_algorithms(torch.bfloat16, "cuda"), reason="there is no GPU that multiplies E4M3"
)
def test_on_a_gpu(network, monkeypatch):
    """The kernels' error is that of their emulation; the bits differ, since one neighbour of h moves all that follows."""
    given = inputs(network.config, 2)
    program = program_of(copy.deepcopy(network).cuda(), torch.bfloat16, fast=True)
    assert "fp8" in program.algorithms.values()
    with torch.inference_mode():
        truth = network(*given)
        on_gpu = program(*(None if t is None else t.cuda() for t in given)).cpu()
        emulate(monkeypatch)
        here = of_a_fast_program(network)(*given)
    errors = [((y - truth).norm() / truth.norm()).item() for y in (on_gpu, here)]
    assert errors[0] < 1.25 * errors[1], errors


def test_the_scale_is_the_norms(network):
    program, modules = of_a_fast_program(network), dict(network.named_modules())
    for step in program.convolutions:
        if step.algorithm == "fp8":
            norm = modules[step.name.replace("conv", "norm")]
            factor = step.packed.view(torch.float32)[:, -3]
            size = (norm.weight.abs() + norm.bias.abs()).max().item() * factor
            assert (factor == factor[0]).all() and 4 <= size[0] <= 8


@pytest.mark.parametrize("quality", ["lossless", "high"])
def test_never_unasked(served, quality):
    """Not even where eight bits are served, and not from a file that asks for them."""
    model = Model(awake(CONFIG), schedules.EDM(), Prediction("edm"), shape=(3, 32, 32))
    compiled = fastdiff.compile(model, quality=quality)
    assert "fp8" not in compiled.program.algorithms.values()
    asked = {name: "fp8" for name in compiled.program.algorithms}
    program = program_of(model.network, compiled.program.dtype, choices=asked)
    assert "fp8" not in program.algorithms.values()


def test_fast_where_eight_bits_are_served(served, tmp_path):
    """compile, sample, and a saved program; `sample` makes the program at once: there is no other way to eight bits."""
    model = Model(awake(CONFIG), schedules.EDM(), Prediction("edm"), "consistency", (3, 32, 32), 0, {1: [80.0]})
    compiled = fastdiff.compile(model, quality="fast")
    chosen = {name for name, algorithm in compiled.program.algorithms.items() if algorithm == "fp8"}
    assert chosen and fastdiff.run(compiled, 1, seeds=[5], quality="fast").engine == "fast"
    done = fastdiff.run(model, 1, seeds=[5], quality="fast")
    program, _ = automatic.kept(model).made["fast", "cpu", "fp8"]  # its other algorithms were measured at another batch
    assert done.engine == "fast" and {n for n, a in program.algorithms.items() if a == "fp8"} == chosen
    high = fastdiff.sample(model, 1, seeds=[5], quality="high")
    assert not torch.equal(high, done.images)
    compiled.save(tmp_path / "fast.safetensors")
    again = fastdiff.load(tmp_path / "fast.safetensors")
    assert again.program.algorithms == compiled.program.algorithms
    for one, two in zip(again.program.convolutions, compiled.program.convolutions, strict=True):
        if two.packed is not None:
            assert torch.equal(one.packed.view(torch.uint8), two.packed.view(torch.uint8))
    assert torch.isfinite(fastdiff.sample(again, 1, seeds=[5])).all()


def test_fast_elsewhere_is_high_and_says_so():
    model = model_of("ddpm")
    done = fastdiff.run(model, 1, seeds=[0], quality="fast")
    assert "quality 'fast' is 'high' here: " + automatic.ONLY in done.engine and done.engine.startswith("network: ")
    assert automatic.ONLY in fastdiff.run(model, 1, seeds=[0], quality="fast", compile="fast").engine
    assert "quality" not in fastdiff.run(model, 1, seeds=[0], quality="high").engine
    compiled = fastdiff.compile(model, quality="fast")
    assert (
        "fp8" not in compiled.program.algorithms.values() and automatic.ONLY in fastdiff.run(compiled, 1, seeds=[0]).engine
    )


def test_nothing_large_enough_is_said(served):
    done = fastdiff.run(model_of("ddpm"), 1, seeds=[0], quality="fast")
    assert done.engine == f"fast: quality 'fast' is 'high' here: {automatic.ONLY}"


def test_a_bound_step_without_a_norm_is_refused(network):
    """By the op itself, should a rule ever choose it."""
    program = of_a_fast_program(network)
    step = next(s for s in program.convolutions if s.algorithm == "fp8")
    step.norm = None
    v = [None] * program.values
    v[step.x] = torch.zeros(1, step.weight.shape[1], 32, 32, dtype=torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError), match="algorithm"):
        step.run(v, [torch.zeros(1, w) for w in program.conditions.widths])
    assert steps.CONV3X3 is ops.overload("conv3x3")

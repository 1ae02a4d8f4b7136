"""accelerate on diffusers' own models: the same numbers, gradients and training, and a way back."""

import copy
import io
import pickle

import pytest
import torch
from foreign_models import MODELS, TOLERANCE, build, expected_counts, far, output

import fastdiff
from fastdiff.accelerate.layers import has_packed

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[test]')")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def gradients(module, inputs):
    module.zero_grad()
    y = output(module, inputs)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return y, {n: p.grad.clone() for n, p in module.named_parameters()}


def test_outputs_and_gradients(name):
    module, inputs = build(name)
    inputs = (inputs[0].requires_grad_(), *inputs[1:])
    expected, theirs = gradients(module, inputs)
    inputs[0].grad = None
    report = fastdiff.accelerate(module)
    assert report.counts == expected_counts(name)
    y, ours = gradients(module, inputs)
    assert far(y, expected) <= TOLERANCE
    largest = max(float(g.abs().max()) for g in theirs.values())
    for n, g in theirs.items():
        assert float((ours[n] - g).abs().max()) <= TOLERANCE * largest, n
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert far(output(module, inputs), expected) <= TOLERANCE


def test_restore_is_exact(name):
    module, inputs = build(name)

    def described():
        return [(n, type(m), {k: v for k, v in vars(m).items() if k != "forward"}) for n, m in module.named_modules()]

    with torch.no_grad():
        before, expected = described(), output(module, inputs)
        fastdiff.accelerate(module)
        output(module, inputs)
        assert fastdiff.restore(module)
        after, y = described(), output(module, inputs)
    assert [(n, kind, list(held)) for n, kind, held in before] == [(n, kind, list(held)) for n, kind, held in after]
    assert all(a[2][k] is v for b, a in zip(before, after, strict=True) for k, v in b[2].items())
    assert torch.equal(y, expected)
    assert fastdiff.restore(module) == ()


def test_parameters_stay(name):
    module, _ = build(name)
    names, parameters, text = list(module.state_dict()), list(module.parameters()), repr(module)
    report = fastdiff.accelerate(module)
    assert list(module.state_dict()) == names and repr(module) == text
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert fastdiff.accelerate(module) == report, "twice is once"
    assert type(module).__module__.startswith("diffusers."), "pipelines save a module under its class's module"


def step(module, inputs, optimiser):
    """One step of training, dropout included where the model has any."""
    module.train()
    gradients(module, inputs)
    optimiser.step()
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def test_a_training_step(name):
    module, inputs = build(name)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    twin = copy.deepcopy(module)
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-4)  # made before accelerate, as people do
    fastdiff.accelerate(module)
    theirs = step(twin, inputs, torch.optim.SGD(twin.parameters(), lr=1e-4))
    ours = step(module, inputs, optimiser)
    largest = max(float(p.abs().max()) for p in theirs.values())
    for n, p in theirs.items():
        assert float((ours[n] - p).abs().max()) <= TOLERANCE * largest, n
        assert torch.equal(ours[n], before[n]) == torch.equal(p, before[n]), n
    module.eval(), twin.eval()
    with torch.no_grad():  # nothing kept from before the step is used
        assert far(output(module, inputs), output(twin, inputs)) <= TOLERANCE


def test_copies_and_pickles():
    module, inputs = build("decoder")
    with torch.no_grad():
        expected = output(module, inputs)
    report = fastdiff.accelerate(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)]
    for twin in copies:
        with torch.no_grad():
            assert far(output(twin, inputs), expected) <= TOLERANCE
            assert fastdiff.accelerate(twin) == report
            next(twin.parameters()).zero_()
            assert far(output(twin, inputs), expected) > TOLERANCE
            assert far(output(module, inputs), expected) <= TOLERANCE, "a copy has parameters of its own"
        fastdiff.restore(twin)
        assert [type(m) for m in twin.modules()] == [type(m) for m in build("decoder")[0].modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_layouts_and_dtypes(name, dtype):
    """The error against float64 is at most twice the original's at the same dtype, and a rounding of the largest value."""
    module, inputs = build(name)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    narrow = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    narrow[0] = narrow[0].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        truth = output(copy.deepcopy(module).double(), wide)
        module = module.to(dtype).to(memory_format=torch.channels_last)
        theirs = far(output(module, narrow), truth)
        fastdiff.accelerate(module)
        y = output(module, narrow)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert far(y, truth) <= 2 * theirs + 2 * torch.finfo(dtype).eps


def test_autocast(name):
    module, inputs = build(name)
    with torch.no_grad():
        truth = output(copy.deepcopy(module).double(), [x.double() if x.is_floating_point() else x for x in inputs])
        with torch.autocast("cpu", torch.bfloat16):
            theirs = output(module, inputs)
            fastdiff.accelerate(module)
            ours = output(module, inputs)
    assert ours.dtype == theirs.dtype
    assert far(ours, truth) <= 2 * far(theirs, truth) + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", [n if n == "decoder" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_compiled_as_one_graph(name):
    """Forward and backward, as far as the code generator."""
    module, inputs = build(name)
    with torch.no_grad():
        expected = output(module, inputs)
        torch._dynamo.reset()
        output(torch.compile(module, backend="eager", fullgraph=True), inputs)  # the original is one graph
        fastdiff.accelerate(module)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert far(output(compiled, inputs), expected) <= TOLERANCE
    _, theirs = gradients(build(name)[0], inputs)
    _, ours = gradients(compiled, inputs)
    largest = max(float(g.abs().max()) for g in theirs.values())
    assert all(float((ours[f"_orig_mod.{n}"] - g).abs().max()) <= TOLERANCE * largest for n, g in theirs.items())


@pytest.mark.slow
def test_compiled_by_inductor(name):
    module, inputs = build(name)
    with torch.no_grad():
        expected = output(module, inputs)
        fastdiff.accelerate(module)
        torch._dynamo.reset()
        assert far(output(torch.compile(module, fullgraph=True), inputs), expected) <= TOLERANCE


def test_another_processor_is_respected():
    """What is exchanged after accelerate is called as it is."""
    from diffusers.models.attention_processor import AttnProcessor

    class Marked(AttnProcessor):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states * 0.5

    module, inputs = build("decoder")
    twin = build("decoder")[0]
    fastdiff.accelerate(module)
    for m in (module, twin):
        m.mid_block.attentions[0].set_processor(Marked())
    with torch.no_grad():
        assert far(output(module, inputs), output(twin, inputs)) <= TOLERANCE
    left = {entry.name: entry.reason for entry in fastdiff.accelerate(module).left}
    assert "Marked" in left["mid_block.attentions.0.group_norm"]


@pytest.mark.parametrize("place", ["norm1", "nonlinearity", "conv1"])
def test_later_hooks_are_called(place):
    module, inputs = build("decoder")
    fastdiff.accelerate(module)
    layer = getattr(module.mid_block.resnets[0], place)
    layer.register_forward_hook(lambda m, args, y: y * 2)
    twin = build("decoder")[0]
    getattr(twin.mid_block.resnets[0], place).register_forward_hook(lambda m, args, y: y * 2)
    with torch.no_grad():
        assert far(output(module, inputs), output(twin, inputs)) <= TOLERANCE


def test_another_version_of_a_block_is_left(monkeypatch):
    """A block that computes something else than its small twin shows keeps its forward, and the report says so."""
    from diffusers.models.resnet import ResnetBlock2D

    own = ResnetBlock2D.forward

    def changed(self, *args, **kwargs):
        return own(self, *args, **kwargs) * 1.01

    changed.__qualname__, changed.__module__ = own.__qualname__, own.__module__
    monkeypatch.setattr(ResnetBlock2D, "forward", changed)
    module, inputs = build("decoder")
    with torch.no_grad():
        expected = output(module, inputs)
        report = fastdiff.accelerate(module)
        assert far(output(module, inputs), expected) <= TOLERANCE
    assert report.counts["group_norm"] == 12 and report.counts["group_norm_silu"] == 1
    assert sum("computes something else" in entry.reason for entry in report.left) == 12


@pytest.mark.skipif(not has_packed(), reason="the native code was not built: convolutions stay PyTorch's")
def test_all_of_a_block_is_in_its_convolutions(name, monkeypatch):
    """In inference no norm in front of a convolution is left over, nor is a residual or the next norm's statistics."""
    from fastdiff import ops

    given, norms, own, own_norm = [], [], ops.conv3x3, ops.group_norm_silu
    monkeypatch.setattr(ops, "conv3x3", lambda *a, **k: given.append(frozenset(k)) or own(*a, **k))
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a, **k: norms.append(1) or own_norm(*a, **k))
    module, inputs = build(name)
    report = fastdiff.accelerate(module)
    given.clear(), norms.clear()  # of the small twins
    with torch.no_grad():
        output(module, inputs)
    resampled = {"unet_2d_adm": 2}.get(name, 0)  # blocks with the resampling between norm and convolution
    blocks = (report.counts["group_norm_silu"] - 1) // 2
    assert sum("stats_groups" in g for g in given) == sum("residual" in g for g in given) == blocks
    assert len(norms) == report.counts.get("group_norm", 0) + resampled


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_layout_stays(layout):
    """An output has the layout that the original gives it, within the model too: people call .view."""
    module, inputs = build("decoder")
    module, shapes = module.to(memory_format=layout), []
    for m in module.modules():
        if isinstance(m, torch.nn.Conv2d) or type(m).__name__ == "ResnetBlock2D":
            m.register_forward_hook(lambda m, args, y: shapes[-1].append(y.stride()))
    for change in (lambda m: None, fastdiff.accelerate):
        change(module.mid_block.resnets[0]), shapes.append([])
        with torch.no_grad():
            output(module, inputs)
    assert shapes[0] == shapes[1]

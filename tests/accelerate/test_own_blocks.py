"""accelerate on blocks that people write: whatever their forward says, the numbers stay, and what fuses is what can."""

import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign_models import TOLERANCE, far
from torch import nn
from torch.nn.functional import silu

import fastdiff
from fastdiff.accelerate.layers import has_packed


class Block(nn.Module):
    """Two norms, one shared SiLU, two convolutions."""

    def __init__(self):
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(4, 16), nn.GroupNorm(2, 16, eps=1e-3)
        self.act, self.dropout = nn.SiLU(), nn.Dropout(0.5)
        self.conv0, self.conv1 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.flag = True


class Nested(Block):  # EDM's way of writing
    fused = 2

    def forward(self, x):
        return x + self.conv1(F.dropout(silu(self.norm1(self.conv0(F.silu(self.norm0(x))))), p=0.5, training=self.training))


class Statements(Block):  # diffusers' way
    fused = 2

    def forward(self, x):
        h = self.norm0(x)
        h = self.act(h)
        h = self.conv0(h)
        h = self.norm1(h)
        h = self.act(h)
        h = self.dropout(h)
        h = self.conv1(h)
        return x + h


class Branches(Block):
    fused = 2

    def forward(self, x):
        if self.flag:
            h = self.norm0(x)
        elif x.shape[0] > 100:
            h = self.norm1(x) * 2
        else:
            h = x
        h = self.act(h)
        h = self.conv0(h)
        for _ in range(2):
            if self.flag:
                h = self.norm1(h)
            h = self.act(h)
        return h


def doubled(function):
    factor = 2

    @functools.wraps(function)
    def call(self, *args, **kwargs):
        return factor * function(self, *args, **kwargs)

    return call


class Decorated(Block):
    fused = 1

    @doubled
    @torch.autocast("cpu", enabled=False)
    def forward(self, x, *, scale=3.0):
        """A text
        of two lines."""
        h = self.act(self.norm0(x))
        return h * scale


class Derived(Nested):
    fused = 1

    def forward(self, x):
        y = super().forward(x)
        y = self.norm0(y)
        y = self.act(y)
        return y


class UsedTwice(Block):  # the norm's own result is needed
    fused = 0

    def forward(self, x):
        h = self.norm0(x)
        g = self.act(h)
        return g + h + self.norm1(x)


class Between(Block):
    fused = 0

    def forward(self, x):
        h = self.norm0(x)
        x = x + h
        h = self.act(h)
        return h + x


class Handled(Block):  # the handler sees what the norm made
    fused = 0

    def forward(self, x):
        try:
            h = self.norm0(x)
            h = self.flag(h)
        except TypeError:
            return h + self.norm1(h)


class OtherActivation(Block):
    fused = 0

    def forward(self, x):
        return F.relu(self.norm0(x)) + torch.sigmoid(self.norm1(x))


class ModuleLevelNames(Block):  # what `activation` means is only known while forward runs
    fused = 0

    def forward(self, x):
        activation = F.silu
        h = self.norm0(x)
        h = activation(h)
        return h


class Inner(Block):
    fused = 1

    def forward(self, x):
        def inner(h):
            h = self.norm0(h)
            h = self.act(h)
            return h

        h = inner(x)
        return self.act(self.norm1(h)) + sum((lambda v: self.act(self.norm1(v)))(x) for _ in range(2))


class OpenAI(nn.Module):
    """Sequentials that are taken apart: scale and shift enter between norm and SiLU."""

    fused = 1

    def __init__(self):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x):
        norm, rest = self.out_layers[0], self.out_layers[1:]
        h = self.in_layers[-1](self.in_layers[:-1](x))
        return rest(norm(h) * 1.5 + 0.25)


OWN = [
    Nested,
    Statements,
    Branches,
    Decorated,
    Derived,
    UsedTwice,
    Between,
    Handled,
    OtherActivation,
    ModuleLevelNames,
    Inner,
]


def random_block(kind):
    torch.manual_seed(0)
    block = kind().eval()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return block, torch.randn(2, 16, 9, 9)


@pytest.mark.parametrize("kind", OWN, ids=lambda k: k.__name__)
def test_any_forward(kind):
    block, x = random_block(kind)
    x.requires_grad_()
    expected = block(x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    report = fastdiff.accelerate(block)
    assert report.counts.get("group_norm_silu", 0) == kind.fused
    assert report.counts.get("group_norm", 0) == 2 - kind.fused
    y = block(x)
    assert far(y, expected) <= TOLERANCE
    assert far(torch.autograd.grad(y.square().sum(), x)[0], theirs) <= TOLERANCE
    with torch.no_grad():
        assert far(block(x), expected) <= TOLERANCE
        torch._dynamo.reset()
        assert far(torch.compile(block, backend="eager", fullgraph=kind not in (Inner, Handled))(x), expected) <= TOLERANCE
        assert far(pickle.loads(pickle.dumps(block))(x), expected) <= TOLERANCE
    fastdiff.restore(block)
    assert type(block) is kind and torch.equal(block(x), expected)


def count_ops(monkeypatch):
    """Calls of group_norm_silu with and without SiLU."""
    from fastdiff import ops

    calls, own = [], ops.group_norm_silu
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a, silu=True, **k: calls.append(silu) or own(*a, silu=silu, **k))
    return calls


@pytest.mark.parametrize("kind", [Nested, Statements], ids=lambda k: k.__name__)
def test_the_fused_op_is_called(kind, monkeypatch):
    """With gradients: without, packed convolutions take the norm in."""
    calls = count_ops(monkeypatch)
    block, x = random_block(kind)
    fastdiff.accelerate(block)
    block(x)
    assert calls == [True, True]


@pytest.mark.skipif(not has_packed(), reason="the native code was not built: convolutions stay PyTorch's")
@pytest.mark.parametrize("kind", [Nested, Statements], ids=lambda k: k.__name__)
def test_norms_enter_the_packed_convolutions(kind, monkeypatch):
    """In inference; F.dropout stands between the second norm and convolution of Nested. Not with gradients or autocast."""
    from fastdiff import ops

    normed, own = [], ops.conv3x3
    monkeypatch.setattr(ops, "conv3x3", lambda *a, **k: normed.append("norm" in k) or own(*a, **k))
    block, x = random_block(kind)
    fastdiff.accelerate(block)
    block(x)
    with torch.no_grad(), torch.autocast("cpu"):
        block(x)
    assert normed == []
    with torch.no_grad():
        block(x)
        assert normed == [True, kind is Statements]
        block(x[:, :, :5, :5])  # 50 pixels in all
    assert len(normed) == 2


def test_the_report_is_what_runs(monkeypatch):
    """Branches: the flag chooses at run time whether norm or nothing stands before the SiLU."""
    calls = count_ops(monkeypatch)
    block, x = random_block(Branches)
    fastdiff.accelerate(block)
    block(x)
    assert calls == [True, True, True]
    calls.clear()
    block.flag = False
    fastdiff.restore(block)
    expected = block(x)
    fastdiff.accelerate(block)
    assert torch.equal(block(x), expected) and calls == []


def test_training_mode_is_read_at_every_call():
    block, x = random_block(Statements)
    twin, _ = random_block(Statements)
    fastdiff.accelerate(block)
    for training in (True, False, True):
        block.train(training), twin.train(training)
        torch.manual_seed(3)
        expected = twin(x)
        torch.manual_seed(3)
        assert far(block(x), expected) <= TOLERANCE


def test_exchanged_layers_are_called_as_they_are():
    block, x = random_block(Statements)
    fastdiff.accelerate(block)
    twin, _ = random_block(Statements)
    for b in (block, twin):
        b.act = nn.ReLU()
        b.conv1 = nn.Identity()
    with torch.no_grad():
        assert far(block(x), twin(x)) <= TOLERANCE


def test_sequentials_that_are_taken_apart():
    module, x = random_block(OpenAI)
    expected = module(x)
    assert fastdiff.accelerate(module).counts["group_norm_silu"] == 2
    assert far(module(x), expected) <= TOLERANCE
    with torch.no_grad():
        assert far(module(x), expected) <= TOLERANCE
    pieces = module.in_layers[:2]
    assert far(pieces(x), F.silu(F.group_norm(x, 4, pieces[0].weight, pieces[0].bias))) <= TOLERANCE


def test_sequential():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1))
    x = torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        expected = plain(x)
        report = fastdiff.accelerate(plain)
        assert report.counts == {"group_norm_silu": 1} | ({"conv3x3": 1} if has_packed() else {})
        assert far(plain(x), expected) <= TOLERANCE
        plain[1] = nn.Tanh()
        assert far(plain(x), plain[2](torch.tanh(plain[0](x)))) <= TOLERANCE


def test_a_class_that_is_patched():
    """accelerate reads the forward that the class has now, not the one it had."""
    block, x = random_block(Statements)
    fastdiff.accelerate(block)
    own = Statements.forward
    try:
        Statements.forward = Nested.forward
        fastdiff.restore(block)
        expected = block(x)
        fastdiff.accelerate(block)
        assert far(block(x), expected) <= TOLERANCE
        Statements.forward = lambda self, x: 3 * own(self, x)
        fastdiff.accelerate(block)
        assert far(block(x), 3 * own(block, x)) <= TOLERANCE
    finally:
        Statements.forward = own


def test_a_class_without_source():
    names: dict = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return self.act(self.norm(x))", names)
    module = names["Hidden"]()
    module.norm, module.act, x = nn.GroupNorm(2, 4), nn.SiLU(), torch.randn(1, 4, 5, 5)
    expected = module(x)
    report = fastdiff.accelerate(module)
    assert report.counts == {"group_norm": 1} and "source" in report.left[0].reason
    assert far(module(x), expected) <= TOLERANCE


def test_a_source_that_changed(tmp_path, monkeypatch):
    """The file says something else than what was imported: it is not believed."""
    import importlib
    import linecache

    text = (
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return self.act(self.norm(x)){}\n"
    )
    path = tmp_path / "edited_network.py"
    path.write_text(text.format(""))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("edited_network").Net()
    path.write_text(text.format(" * 100"))
    linecache.checkcache()
    module.norm, module.act, x = nn.GroupNorm(2, 4), nn.SiLU(), torch.randn(1, 4, 5, 5)
    expected = module(x)
    report = fastdiff.accelerate(module)
    assert "not what its source says" in report.left[0].reason
    assert far(module(x), expected) <= TOLERANCE

"""What sampling sets for a while is set while anybody samples, and back when nobody does."""

import threading

import pytest
import torch
from tiny import awake, tiny

import fastdiff
from fastdiff import flags, schedules


def test_two_threads_sample_one_model():
    """A network in train mode, with dropout: the second sampler goes on when the first has gone."""
    network = awake(tiny(dropout=0.5)).train()
    model = fastdiff.wrap(network, schedule=schedules.EDM(), precondition=True)
    request = {"nfe": 3, "sampler": "euler", "seeds": range(2), "compile": "off"}
    expected = fastdiff.sample(model, **request)
    both, first_gone = threading.Event(), threading.Event()
    images = {}

    def first():
        images[0] = fastdiff.sample(model, **request, callback=lambda i, x: both.wait(60))
        first_gone.set()

    def second(i, x):
        both.set()
        assert first_gone.wait(60)

    begun = threading.Thread(target=first)
    begun.start()
    try:
        images[1] = fastdiff.sample(model, **request, callback=second)
    finally:
        both.set()
        begun.join()
    assert torch.equal(images[0], expected) and torch.equal(images[1], expected)
    assert all(m.training for m in network.modules())


def test_modes_come_back():
    """Each module's own, whoever leaves first and after an error."""
    network = awake(tiny())
    network.middle.train()
    before = [m.training for m in network.modules()]
    assert any(before) and not all(before)
    a, b = flags.evaluating(network), flags.evaluating(network)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert not any(m.training for m in network.modules())
    b.__exit__(None, None, None)
    assert [m.training for m in network.modules()] == before
    with pytest.raises(ZeroDivisionError), flags.evaluating(network):
        1 / 0  # noqa: B018
    assert [m.training for m in network.modules()] == before and not flags._modules
    with flags.evaluating(None):
        pass


def now():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def tf32():
    before = now()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("value", [True, False])
def test_tf32_comes_back(tf32, value):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = value, not value
    a, b = flags.exact("lossless"), flags.exact("lossless")
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert now() == (False, False)
    with flags.exact("high"):
        assert now() == (False, False)
    b.__exit__(None, None, None)
    assert now() == (value, not value)
    with flags.exact("high"):
        assert now() == (value, not value)


@pytest.mark.parametrize("value", [True, False])
def test_cudnn_measures_while_anybody_wants_it(monkeypatch, value):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", value)
    a, b = flags.autotuned(), flags.autotuned()
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert torch.backends.cudnn.benchmark
    b.__exit__(None, None, None)
    assert torch.backends.cudnn.benchmark == value and not flags._autotuned

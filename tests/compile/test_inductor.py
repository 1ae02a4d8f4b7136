"""torch.compile of the same model: one graph without breaks, which seeds, labels and guidance weights do not make again."""

import functools

import pytest
import torch
from compiled_networks import model_of

import fastdiff

SEEDS = range(4)
REQUESTS = [{"labels": 0}, {"labels": [2, 1, 0, 1]}, {"seeds": [9, 8, 7, 6]}, {"nfe": 3, "sampler": "euler"}]


def same_graph(model):
    """Requests that differ in values alone, compiled and plain; a graph break or a second graph raises."""
    torch._dynamo.reset()
    model.info["null_label"] = 0
    guided = [{"guidance": w, "labels": 1} for w in (1.5, 3.0)]
    for requests in (REQUESTS, guided):
        for i, request in enumerate(requests):
            request = {"nfe": 2, "seeds": SEEDS} | request
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                got = fastdiff.run(model, **request, compile="inductor")
            assert got.engine == "inductor"
            assert (got.images - fastdiff.sample(model, **request, compile="off")).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["adm", "ncsnpp-skip"])
def test_one_graph(name, monkeypatch):
    """Traced whole; the graph itself runs eagerly here, which the next test does not."""
    model = model_of(name)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if model.labels:
        same_graph(model)
        return
    torch._dynamo.reset()
    for i, seeds in enumerate((SEEDS, [5, 6, 7, 8])):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            fastdiff.sample(model, 2, seeds=seeds, compile="inductor")


@pytest.mark.slow
def test_inductor():
    same_graph(model_of("adm"))


def test_functions_are_compiled_too(monkeypatch):
    """What fastdiff.wrap was given need not be a module."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = fastdiff.wrap(lambda x, t: 0.5 * x, schedule=fastdiff.schedules.EDM(), shape=(1, 4, 4))
    got, expected = (fastdiff.sample(model, 2, seeds=SEEDS, compile=how) for how in ("inductor", "off"))
    assert torch.equal(got, expected)

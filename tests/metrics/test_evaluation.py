"""Evaluation against a model whose images are known, and its request checked."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.metrics import Reference, evaluate, frechet, gaussian, table
from fastdiff.metrics.classifier import Classifier
from fastdiff.metrics.evaluation import natural_labels
from fastdiff.training import ImageData

COUNTS = [30, 10]


@pytest.fixture(scope="module")
def data():
    labels = torch.tensor([0] * 30 + [1] * 10)
    noise = torch.randint(0, 60, (40, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return ImageData((noise + 120 * labels[:, None, None, None]).byte(), labels)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return Classifier((1, 8, 8), 2).eval().requires_grad_(False)


def exact(labels=2):
    """A 'consistency' model that shows a flat grey for every class, whatever the noise."""

    def net(x, t, labels=None):
        c = torch.zeros(len(x)) if labels is None else labels.float()
        return (c - 0.5).reshape(-1, 1, 1, 1).expand_as(x)

    return fastdiff.wrap(
        net, schedule=fastdiff.schedules.EDM(), prediction="x0", shape=(1, 8, 8), labels=labels, family="consistency"
    )


def test_natural_labels_have_the_class_frequencies():
    for n in (64, 1_000, 10_000):
        counts = np.bincount(natural_labels(n, np.array([5, 3, 2])), minlength=3)
        assert np.abs(counts - n * np.array([0.5, 0.3, 0.2])).max() < 4  # a golden-ratio sequence is never further off


@pytest.mark.parametrize("labels", [2, 0])
def test_row(data, judge, labels):
    """One evaluation shows the flat images themselves: distance, agreement and counts can be made by hand."""
    reference = Reference.of(data.images, data.labels, judge)
    row = evaluate(exact(labels), reference, 1, 40, batch_size=16)
    wanted = torch.tensor(natural_labels(40, np.array(COUNTS)))
    images = (wanted.float() - 0.5 if labels else torch.full((40,), -0.5)).reshape(-1, 1, 1, 1).expand(40, 1, 8, 8)
    features, classes = judge.classify(images)
    assert row.fd == pytest.approx(frechet(gaussian(features), reference.other), rel=1e-6)
    assert row.agreement == (pytest.approx(float((classes == wanted).double().mean())) if labels else None)
    assert (row.nfe, row.n, row.seeds, row.sampler, row.times) == (1, 40, (0, 39), "consistency", [80.0])
    assert row.images_per_second == pytest.approx(40 / row.seconds)
    assert row.floor == reference.floor(40) and f"{row.fd:.3f}" in table([("name", row)])


def test_evaluations_are_counted_and_images_not_kept(data, judge, monkeypatch):
    """The number reported is that of network calls; at most CHUNK images are asked for at a time, all seeds once."""
    from fastdiff.metrics import evaluation as module

    asked, run = [], module.run
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "run", lambda *a, **k: asked.append(list(k["seeds"])) or run(*a, **k))
    row = evaluate(exact(), Reference.of(data.images, data.labels, judge), 3, 40, first_seed=5, sampler="consistency")
    assert row.nfe == 3 and [len(a) for a in asked] == [16, 16, 8] and [s for a in asked for s in a] == list(range(5, 45))
    row = evaluate(exact(), Reference.of(data.images, data.labels, judge), 5, 8, sampler="heun")
    assert row.nfe == 5 and len(row.times) == 5


def test_adaptive_evaluations(data, judge, monkeypatch):
    """rk45 takes as many as an image needs, in other chunks another number: the most is reported, however they are cut."""
    from fastdiff.metrics import evaluation as module

    def net(x, t, labels=None):
        return torch.sin(x[:, :, :1, :1]).expand_as(x)  # one pixel says how hard the path is

    model = fastdiff.wrap(net, schedule=fastdiff.schedules.EDM(), prediction="x0", shape=(1, 8, 8))
    reference = Reference.of(data.images, data.labels, judge)
    whole = evaluate(model, reference, 500, 12, sampler="rk45", rtol=1e-3, atol=1e-3)
    counts, run = [], module.run

    def counted(*given, **options):
        made = run(*given, **options)
        counts.append(made.evaluations)
        return made

    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "run", counted)
    row = evaluate(model, reference, 500, 12, sampler="rk45", rtol=1e-3, atol=1e-3)
    assert len(set(counts)) > 1 and row.nfe == max(counts) == whole.nfe and row.sampler == "rk45"
    assert row.fd == pytest.approx(whole.fd)


def test_real_images_have_the_floor(data, judge):
    """Half A as if it were generated."""
    reference = Reference.of(data.images, data.labels, judge)
    assert reference.floor(10**6) == pytest.approx(frechet(gaussian(reference.features), reference.other), rel=1e-12)
    assert reference.floor(5) > reference.floor(20) > 0


def test_bad_requests(data, judge):
    reference = Reference.of(data.images, data.labels, judge)
    with pytest.raises(ValueError, match="n: 1 images have no covariance"):
        evaluate(exact(), reference, 1, 1)
    more = ImageData(data.images, torch.arange(40))
    with pytest.raises(ValueError, match="data: it has 40 classes, the model knows 2"):
        evaluate(exact(), Reference.of(more.images, more.labels, judge), 1, 4)
    with pytest.raises(ValueError, match="data: 3 images make no reference"):
        Reference.of(data.images[:3], None, judge)

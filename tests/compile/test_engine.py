"""sample() by a compiled program: the same images to rounding, kept with the model, remade when weights change."""

import copy
import dataclasses
import itertools
import pickle
import sys
import threading
import warnings

import pytest
import torch
from compiled_networks import model_of
from tiny import awake

import fastdiff
from fastdiff import schedules
from fastdiff.compile import automatic, fits, measured, program
from fastdiff.request import QUALITIES

choose = sys.modules["fastdiff.compile.choose"]

SEEDS = range(5)


@pytest.mark.parametrize("name", ["ddpm", "adm", "ddpmpp", "ncsnpp-skip"])
def test_images(name):
    """They agree with the network's own to 2e-5 of its output, which two steps double at most, in every batch to the bit."""
    model = model_of(name)
    plain, fast = (fastdiff.run(model, 2, seeds=SEEDS, compile=how) for how in ("off", "fast"))
    assert plain.engine == "network: compile='off'" and fast.engine == "fast" and fast.evaluations == 2
    assert (plain.images - fast.images).abs().max() <= 4e-5
    for size in (1, 2, 3):
        assert torch.equal(fastdiff.sample(model, 2, seeds=SEEDS, compile="fast", batch_size=size), fast.images)
    high = fastdiff.sample(model, 2, seeds=SEEDS, compile="fast", quality="high")
    assert 0 < (high - plain.images).abs().max() < 0.5


@pytest.mark.parametrize("options", [{"guidance": 1.5}, {"sampler": "dpm-solver++sde", "nfe": 5}, {"nfe": 1}])
def test_every_request(options):
    """Guidance doubles the batch, stochastic solvers draw noise: the network is called as before."""
    model = model_of("adm")
    model.info["null_label"] = 0
    request = {"model": model, "nfe": 2, "seeds": SEEDS} | options
    plain, fast = (fastdiff.sample(**request, compile=how) for how in ("off", "fast"))
    assert (plain - fast).abs().max() <= 1e-4  # guidance amplifies rounding


def test_guide_model():
    """A weaker model is computed in the same way."""
    model, weaker = model_of("adm"), model_of("adm")
    weaker.network = awake(weaker.network.config, seed=5)
    request = {"nfe": 2, "seeds": SEEDS, "guidance": fastdiff.Guide(1.5, weaker)}
    plain, fast = (fastdiff.sample(model, **request, compile=how) for how in ("off", "fast"))
    assert (plain - fast).abs().max() <= 1e-4
    assert automatic.kept(weaker).made


def test_compile_gives_a_model(model):
    """fastdiff.compile(model) is sampled as any model; nfe tabulates, quality and size reach the program."""
    fast = fastdiff.compile(model, batch=2, nfe=2)
    assert isinstance(fast, fastdiff.Compiled) and fast.hash() == model.hash() and fast.device == model.device
    assert torch.equal(fast.state["conv_in.weight"], model.state["conv_in.weight"])
    plain = fastdiff.sample(model, 2, seeds=SEEDS, compile="off")
    assert (fastdiff.sample(fast, 2, seeds=SEEDS) - plain).abs().max() <= 4e-5
    assert fastdiff.run(fast, 2, seeds=[1]).engine == "fast"
    assert fastdiff.compile(fast, quality="high").program.dtype == torch.bfloat16
    assert fastdiff.compile(model, size=(16, 8)).program.size == (16, 8)
    unconditional = fastdiff.compile(model_of("ddpm"), nfe=3, sampler="euler")
    assert len(unconditional.program.conditions.times()) == 3


def test_what_is_not_lowered(model):
    """The network is used as it is, and the reason is said."""
    wrapped = fastdiff.wrap(lambda x, t: x, schedule=schedules.EDM(), shape=(1, 4, 4))
    with pytest.warns(UserWarning, match="the network stays as it is: it is a function, no fastdiff.UNet"):
        assert fastdiff.compile(wrapped) is wrapped
    assert fastdiff.run(wrapped, 1, seeds=[0], compile="fast").engine == "network: it is a function, no fastdiff.UNet"
    calls = []
    hook = model.network.middle[0].register_forward_hook(lambda *given: calls.append(1))
    assert "middle.0 has forward hooks" in fastdiff.run(model, 1, seeds=[0], compile="fast").engine
    assert calls
    hook.remove()
    half = dataclasses.replace(model, network=copy.deepcopy(model.network).half())
    assert "its weights are torch.float16; network.float()" in fits.obstacle(half.network)
    model.network.conv_out = torch.nn.utils.parametrizations.weight_norm(model.network.conv_out)
    assert "which fastdiff.UNet does not build" in fits.obstacle(model.network)


def test_unsupported_processors(model, monkeypatch):
    """Without native code programs are not made: the references' norm is slower than the modules'."""
    monkeypatch.setattr(fits, "served", lambda op, device: fastdiff.ops.Served("reference", "not built"))
    monkeypatch.setattr(fits, "_said", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for how in ("fast", "auto", "off"):
            engine = fastdiff.run(model, 1, seeds=[0], compile=how).engine
            assert "reference ops" in engine or how == "off"
    assert [str(w.message)[:55] for w in said] == ["sample: no program can be made, and the network is slow"], "said once"
    with pytest.warns(UserWarning, match="the network stays as it is: this processor runs the reference ops"):
        assert fastdiff.compile(model) is model


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))


def test_auto_compiles_where_it_pays(model, monkeypatch, nothing_known):
    """Not for a few images; for many; and a program that is there is used whatever the number."""
    monkeypatch.setattr(program, "LIGHT", 0)
    few = fastdiff.run(model, 2, seeds=SEEDS)
    assert few.engine.startswith("network: compiling takes some 1.0 s and would save 0.0 s; compile='fast' does it")
    for name in ("WORTH", "SECONDS", "TRIALS", "SECONDS_PER_WEIGHT"):
        monkeypatch.setattr(automatic, name, 0.0)
    assert fastdiff.run(model, 2, seeds=SEEDS).engine == "fast"
    monkeypatch.undo()
    assert fastdiff.run(model, 2, seeds=[3]).engine == "fast"
    assert fastdiff.run(model, 2, seeds=[3], compile="off").engine.startswith("network")
    assert fastdiff.run(model, 2, seeds=[3], dtype=torch.float16).engine.startswith("network: programs compute in float32")


def test_light_networks_have_a_program_at_once(model, monkeypatch, nothing_known):
    """At the first call, made once and without a measurement: an image has one set of bits in all calls and processes."""
    made, make = [], automatic._unmeasured
    monkeypatch.setattr(automatic, "_unmeasured", lambda *given: made.append(make(*given)) or made[-1])
    monkeypatch.setattr(choose, "_measure", lambda *given: pytest.fail("measured"))
    first = fastdiff.run(model, 2, seeds=[3])
    rest = [fastdiff.run(model, 2, seeds=SEEDS, batch_size=size) for size in (1, 2, 5)]
    assert len(made) == 1 and {r.engine for r in (first, *rest)} == {"fast"}
    assert all(torch.equal(r.images[3], first.images[0]) and torch.equal(r.images, rest[0].images) for r in rest)
    assert set(made[0].algorithms.values()) == {"winograd4"}, "all are narrow"
    assert torch.equal(fastdiff.sample(copy.deepcopy(model), 2, seeds=SEEDS, compile="fast"), rest[0].images)
    assert len(made) == 2
    with torch.no_grad():
        model.network.conv_out.weight.mul_(1.5)
    assert not torch.equal(fastdiff.sample(model, 2, seeds=SEEDS), rest[0].images) and len(made) == 3
    assert fastdiff.run(model, 2, seeds=[3], quality="high").engine.startswith("network: compiling takes some")
    assert fastdiff.run(model, 2, seeds=[3], deterministic=True).engine == "network: compile='off'"
    monkeypatch.setattr(program, "LIGHT", sum(p.numel() for p in model.network.parameters()) - 1)
    heavy = copy.deepcopy(model)
    assert fastdiff.run(heavy, 2, seeds=[3]).engine.startswith("network: compiling takes some") and len(made) == 3


def test_programs_leave_modes_alone(model):
    """A program has no dropout: the modules of its network are not looked at."""
    model.network.train()
    seen = []
    callback = lambda i, x: seen.append([m.training for m in model.network.modules()])  # noqa: E731
    fastdiff.sample(model, 2, seeds=[0], callback=callback)
    assert all(map(all, seen))
    fastdiff.sample(model, 2, seeds=[0], callback=callback, compile="off")
    assert len(seen) == 4 and not any(map(any, seen[2:]))


def test_what_a_program_costs(model, nothing_known):
    """Half of the layer sizes known, half of the measuring left; all of them, packing alone."""
    first = _cost(model)
    sizes = sorted(automatic._size(model.network)[1])
    known = measured.choices(torch.float32, automatic.BATCH)
    costs = []
    for size in sizes:
        known.add(size, "library")
        costs.append(_cost(model))
    assert sizes == sorted(automatic.layers(fastdiff.compile(model).program))
    assert all(a > b for a, b in itertools.pairwise([first, *costs])), costs
    packing = automatic.SECONDS_PER_WEIGHT * sum(p.numel() for p in model.network.parameters())
    assert costs[-1] == pytest.approx(automatic.WORTH + packing)


def _cost(model):
    """Seconds of the program: saved seconds at which it is made, by bisection of the evaluations."""
    few, many = 0.0, 1e9
    for _ in range(60):
        middle = (few + many) / 2
        automatic.kept(model).evaluations = 0
        reason = automatic._too_little(model, model.network, torch.device("cpu"), torch.float32, middle)
        few, many = (middle, many) if reason else (few, middle)
    operations, _ = automatic._size(model.network)
    return automatic.SAVED * many * operations / (automatic.OPERATIONS_PER_SECOND * torch.get_num_threads())


CHANGES = {
    "in place": lambda net: net.conv_out.weight.mul_(1.5),
    "below .data": lambda net: net.conv_out.weight.data.mul_(1.5),
    "replaced": lambda net: setattr(net.conv_out, "weight", torch.nn.Parameter(net.conv_out.weight * 1.5)),
    ".data replaced": lambda net: setattr(net.conv_out.weight, "data", net.conv_out.weight * 1.5),
    "loaded": lambda net: net.load_state_dict({k: 1.5 * v for k, v in net.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(model, change):
    """A model that is trained on between two calls is compiled again."""
    before = fastdiff.sample(model, 2, seeds=SEEDS, compile="fast")
    with torch.no_grad():
        CHANGES[change](model.network)
    fast, plain = (fastdiff.sample(model, 2, seeds=SEEDS, compile=how) for how in ("fast", "off"))
    assert (fast - plain).abs().max() <= 4e-5 and (fast - before).abs().max() > 1e-3


def test_kept_and_bounded(model):
    """One program for each type, made once; copies and pickles of a model leave programs behind."""
    for dtype in (torch.float32, torch.bfloat16):
        fastdiff.sample(model, 1, seeds=[0], compile="fast", dtype=dtype)
    store = automatic.kept(model)
    assert len(store.made) == 2
    first = store.made[("fast", "cpu", torch.float32)][0]
    fastdiff.sample(model, 1, seeds=[1], compile="fast")
    assert store.made[("fast", "cpu", torch.float32)][0] is first
    assert not automatic.kept(copy.deepcopy(model)).made and not automatic.kept(pickle.loads(pickle.dumps(model))).made
    for i in range(2 * automatic.KEPT):
        store.get(i, model.network, lambda: first)
    assert len(store.made) == automatic.KEPT


def test_threads(model):
    """Two threads that sample at once: one compiles, both get what one gets."""
    expected = fastdiff.sample(model_of("adm"), 2, seeds=SEEDS, compile="fast")
    found = [None, None]

    def work(i):
        found[i] = fastdiff.sample(model, 2, seeds=SEEDS, compile="fast")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # the two models were measured one by one, and may have chosen differently where algorithms are about as fast
    assert torch.equal(found[0], found[1]) and (found[0] - expected).abs().max() <= 4e-5
    assert len(automatic.kept(model).made) == 1


def test_lossless_leaves_out_tf32():
    """float32 is float32 on GPUs too; what was set is set again."""
    seen = []

    def net(x, t):
        seen.append(torch.backends.cudnn.allow_tf32)
        return x

    model = fastdiff.wrap(net, schedule=schedules.EDM(), shape=(1, 2, 2))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        fastdiff.sample(model, 1, seeds=[0])
        fastdiff.sample(model, 1, seeds=[0], quality="high")
        assert seen == [False, True] and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


BAD = [
    ({"quality": "best"}, ValueError, "quality: 'best' is not known; use one of lossless, high, fast"),
    ({"compile": "max"}, ValueError, "compile: 'max' is not known; use one of auto, off, fast, inductor"),
]


@pytest.mark.parametrize(("request_", "kind", "words"), BAD, ids=["quality", "compile"])
def test_bad_requests(model, request_, kind, words):
    with pytest.raises(kind, match=words):
        fastdiff.sample(model, 1, seeds=[0], **request_)
    if "quality" in request_:
        with pytest.raises(kind, match=words):
            fastdiff.compile(model, **request_)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model: expected a fastdiff.Model, got Linear; fastdiff.load\(...\) gives one"):
        fastdiff.compile(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="batch_size: 0 is no size"):
        fastdiff.compile(model_of("ddpm"), batch=0)


def test_qualities():
    assert list(QUALITIES) == ["lossless", "high", "fast"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        high, fast = (fastdiff.sample(model_of("ddpm"), 1, seeds=[0], quality=q) for q in ("high", "fast"))
    assert torch.equal(high, fast)

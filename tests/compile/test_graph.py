"""The captured loop, with a stand-in that records what CUDA graphs would: what is captured, replayed and refused."""

import contextlib
import warnings
from unittest import mock

import pytest
import torch
from compiled_networks import model_of

import fastdiff
from fastdiff.compile import automatic
from fastdiff.compile.graph import KEPT, CudaGraphs, Graphs, bucket

SEEDS = [3, 1, 4, 1, 5]


class Recorder:
    """Calls in place of captured kernels: right only if a replay reads static tensors and nothing on the host changes."""

    def __init__(self, most=10**9):
        self.records, self.replays, self.most = 0, 0, most

    def record(self, call, reset):
        self.records += 1
        call()
        reset()

        def replay():
            self.replays += 1
            call()

        return replay

    def cost(self, call):
        call()
        return 10

    def free(self):
        return 10 * self.most


class Full(Recorder):
    """Has no memory for a capture."""

    def record(self, call, reset):
        raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def captured(monkeypatch):
    """sample(compile="fast") through Graphs; the recorder."""

    def install(backend):
        graphs = Graphs(backend)
        monkeypatch.setattr(
            automatic,
            "_captured",
            lambda model, network, where, program: automatic.Engine(program, "fast", execute=graphs.execute),
        )
        return graphs

    return install


PLANS = [(2, "euler"), (6, "unipc"), (5, "heun"), (12, "euler"), (13, "dpm-solver++sde")]


@pytest.mark.parametrize(("nfe", "sampler"), PLANS)
def test_images(captured, nfe, sampler):
    """Plans of up to 8 evaluations are one capture, longer ones one for each kind of row; then seeds are inputs alone."""
    model = model_of("adm")
    request = {"nfe": nfe, "sampler": sampler, "compile": "fast"}
    expected = [fastdiff.sample(model, seeds=s, **request) for s in (SEEDS, [9, 8, 7, 6, 5, 4])]
    recorder = Recorder()
    graphs = captured(recorder)
    got = [fastdiff.run(model, seeds=s, **request) for s in (SEEDS, [9, 8, 7, 6, 5, 4])]
    assert all(torch.equal(a, b.images) for a, b in zip(expected, got, strict=True))
    assert recorder.records == len(graphs.sessions) == 1 and got[0].evaluations == nfe
    assert recorder.replays == (2 if nfe <= 8 else 2 * len(got[0].plan.rows))


def test_labels_guidance_and_types(captured):
    """A new label or weight is a new input, never a new capture."""
    model = model_of("adm")
    model.info["null_label"] = 0
    requests = [{"labels": k, "guidance": w} for k, w in ((0, 1.5), (1, 1.5), ([0, 1, 2, 1, 0], 3.0), (2, 0.5))]
    expected = [fastdiff.sample(model, 2, seeds=SEEDS, compile="fast", **r) for r in requests]
    recorder = Recorder()
    captured(recorder)
    for request, images in zip(requests, expected, strict=True):
        assert torch.equal(fastdiff.sample(model, 2, seeds=SEEDS, compile="fast", **request), images)
    assert recorder.records == 1
    weights = [1.0, 2.0, 3.0, 0.0, 1.5]
    a = fastdiff.sample(model, 2, seeds=SEEDS, compile="fast", guidance=fastdiff.Guide(weights))
    assert recorder.records == 2
    alone = fastdiff.sample(model, 2, seeds=SEEDS[1:2], compile="fast", guidance=fastdiff.Guide(weights[1:2]), labels=1)
    assert torch.equal(alone[0], a[1])


def test_start_and_given_noise(captured):
    """A start is an input of the first step; given noise and callbacks take the loop that is not captured."""
    model = model_of("ddpm")
    request = {"nfe": 2, "seeds": SEEDS, "sampler": "euler", "compile": "fast"}
    start = {"start": torch.randn(3, 8, 8).clamp(-1, 1), "t_start": 5.0}
    expected = [fastdiff.sample(model, **request, **extra) for extra in (start, {})]
    recorder = Recorder()
    captured(recorder)
    assert torch.equal(fastdiff.sample(model, **request, **start), expected[0])
    noise = [fastdiff.ops.philox_normal(fastdiff.ops.seed_tensor(SEEDS), 0, model.shape)]
    before = recorder.records
    seen = []
    fastdiff.sample(model, 2, noise=noise, sampler="euler", compile="fast")
    fastdiff.sample(model, **request, callback=lambda i, x: seen.append(i))
    assert recorder.records == before and seen == [0, 1]


def test_buckets(captured):
    assert [bucket(n) for n in (1, 2, 3, 5, 33, 63, 64, 65, 200)] == [1, 2, 4, 8, 64, 64, 64, 128, 256]
    model = model_of("ddpm")
    recorder = Recorder()
    graphs = captured(recorder)
    for n in (1, 2, 3, 4, 5, 8, 9, 16, 17):
        fastdiff.sample(model, 1, seeds=range(n), compile="fast")
    assert recorder.records == 6 and len(graphs.sessions) == KEPT
    assert fastdiff.run(model, 1, seeds=[0, 1, 2], compile="fast").engine == "fast: captured for batches of 4, 8, 16, 32"


def test_out_of_memory(captured):
    """The step-wise loop instead, once, with the batch that would fit."""
    model = model_of("ddpm")
    expected = fastdiff.sample(model, 2, seeds=range(9), compile="fast")
    captured(Full(most=6))
    with pytest.warns(UserWarning, match="capturing 9 images at once ran out of memory.* batch_size=4 would fit"):
        got = fastdiff.sample(model, 2, seeds=range(9), compile="fast")
    assert torch.equal(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastdiff.run(model, 2, seeds=range(9), compile="fast")
    assert torch.equal(again.images, expected)
    assert again.engine == "fast: captured for batches of none; 1 step by step, out of memory"


def test_capture_finds_what_warming_up_measured(monkeypatch):
    """Both run with cuDNN's measuring on, in this order, on a stream of their own; replaying is the graph's."""
    events = []

    @contextlib.contextmanager
    def entered(name):
        events.append(name)
        yield
        events.append(f"{name} ends")

    graph, stream = mock.Mock(), mock.Mock()
    for name, stand_in in {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: entered("warming up"),
        "CUDAGraph": lambda: graph,
        "device": lambda device: contextlib.nullcontext(),
        "graph": lambda graph, pool, stream, capture_error_mode: entered(f"{capture_error_mode} in the {pool}"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    measured = torch.backends.cudnn.benchmark
    replay = CudaGraphs(torch.device("cuda")).record(
        lambda: events.append(f"measuring: {torch.backends.cudnn.benchmark}"), lambda: events.append("reset")
    )
    begun, ended = ["warming up", "measuring: True", "reset", "warming up ends"], ["thread_local in the pool ends", "reset"]
    assert events == [*begun, "thread_local in the pool", "measuring: True", *ended]
    assert replay == graph.replay and torch.backends.cudnn.benchmark == measured

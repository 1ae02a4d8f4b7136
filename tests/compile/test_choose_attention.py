"""What computes attention on a GPU, with a stand-in for its clock: measured once, refused where it is wrong, and kept."""

import contextlib
import copy
import dataclasses
import json
import sys
import warnings
from unittest import mock

import pytest
import torch
from compiled_networks import NETWORKS, inputs, model_of
from tiny import awake, tiny

import fastdiff
from fastdiff.compile import attend, measured, program_of, store
from fastdiff.compile.attend import FUSED
from fastdiff.compile.timing import CALLS, REPLAYS, ROUNDS, GraphTimer, medians

choosing = sys.modules["fastdiff.compile.choose_attention"]
NAMES = ("cudnn", "flash", "efficient")
FASTEST = {"fused": 1.0, "cudnn": 0.5, "flash": 0.7, "efficient": 0.8}
RIGHT = attend.BACKENDS["math"]
# Two shapes of attention: 2 heads at 4x4, and 2 at 2x2 with twice the channels.
CONFIG = tiny(resolution=8, channels=16, multipliers=(1, 2, 4), blocks=1, attention=(4, 2), head_channels=16, groups=4)


class Clock:
    """Records calls as they are, and tells the time by which back end was in them."""

    def __init__(self, seconds):
        self.seconds_of, self.recorded, self.timed, self.last, self.uncaptured = seconds, [], [], FUSED, set()

    def record(self, call):
        self.last = FUSED
        call()
        self.recorded.append(self.last)
        if self.last in self.uncaptured:
            raise RuntimeError("operation not permitted when stream is capturing")
        call.__dict__["name"] = self.last
        return call

    def seconds(self, replay):
        self.timed.append(replay.name)
        return self.seconds_of[replay.name]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """install(seconds by name): this CPU is measured as GPUs are, with three back ends."""
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))

    def install(seconds=FASTEST, **calls):
        clock = Clock(seconds)

        def named(name):
            def call(*given):
                clock.last = name
                return calls.get(name, RIGHT)(*given)

            return call

        for name in NAMES:
            monkeypatch.setitem(attend.BACKENDS, name, named(name))
            monkeypatch.setitem(attend.CHECKS, name, lambda params, debug: True)
        for dtype in choosing.CANDIDATES:
            monkeypatch.setitem(choosing.CANDIDATES, dtype, NAMES)
        monkeypatch.setitem(choosing.TIMERS, "cpu", lambda device: clock)
        return clock

    return install


def library(network):
    """No convolution is measured."""
    return {name: "library" for name, _ in network.named_modules()}


def chosen(network=None, dtype=torch.float32, batch=1):
    network = network or awake(CONFIG)
    return set(program_of(network, dtype, batch, choices=library(network)).attention_algorithms.values())


@pytest.mark.parametrize(("cudnn", "expected"), [(0.5, "cudnn"), (0.72, "cudnn"), (0.8, "flash"), (0.99, "flash")])
def test_the_fastest_is_chosen(clock, cudnn, expected):
    install = clock(FASTEST | {"cudnn": cudnn})
    network = awake(CONFIG)
    program = program_of(network, torch.float32, 3, choices=library(network))
    assert set(program.attention_algorithms.values()) == {expected} and len(program.attentions) > 2
    assert all(step.library is not None and step.algorithm == expected for step in program.attentions)
    shapes = {(step.heads, step.qkv[0].shape, program.sizes[step.name]) for step in program.attentions}
    assert len(shapes) == 2 and len(install.recorded) == 4 * len(shapes), "each shape is measured once"


@pytest.mark.parametrize(("seconds", "expected"), [(0.97, FUSED), (0.93, "cudnn")])
def test_the_fused_op_must_lose_clearly(clock, seconds, expected):
    clock({"fused": 1.0, "cudnn": seconds, "flash": 1.0, "efficient": 2.0})
    assert chosen() == {expected}


def test_they_take_turns(clock):
    timed = clock({name: 1.0 for name in FASTEST}).timed
    chosen(awake(dataclasses.replace(CONFIG, attention=(2,))))
    assert timed[:8] == [FUSED, *NAMES, FUSED, *NAMES]


def test_a_median_without_the_first_round():
    """One slow round, and those in which a clock rises, decide nothing; long steps get fewer rounds."""

    class Slow:
        def __init__(self, scale):
            self.count, self.scale = 0, scale

        def seconds(self, replay):
            self.count += 1
            return self.scale * (100.0 if self.count in (1, 5) else 1.0)

    timer = Slow(1e-6)
    assert medians(timer, {"one": lambda: None}) == {"one": 1e-6} and timer.count == ROUNDS + 1
    timer = Slow(1.0)
    assert medians(timer, {"one": lambda: None}) == {"one": 1.0} and timer.count == 4


def test_graphs_between_events(monkeypatch):
    """On the program's GPU; what is captured is the call some times over, its seconds those of one."""
    events = []

    @contextlib.contextmanager
    def on(device):
        events.append(device)
        yield
        events.append("left")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("synchronize")

        def elapsed_time(self, end):
            return 16.0  # ms

    class Graphs:
        def __init__(self, device):
            assert device == torch.device("cuda", 1)

        def record(self, call, reset):
            call()
            reset()
            return lambda: events.append("replay")

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(sys.modules["fastdiff.compile.timing"], "CudaGraphs", Graphs)
    timer, call = GraphTimer(torch.device("cuda", 1)), mock.Mock()
    replay = timer.record(call)
    assert call.call_count == CALLS and events == [torch.device("cuda", 1), "left"]
    assert timer.seconds(replay) == pytest.approx(0.016 / CALLS / REPLAYS)
    assert events[2:] == [torch.device("cuda", 1), "record", *["replay"] * REPLAYS, "record", "synchronize", "left"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_without_tf32(clock, monkeypatch, dtype):
    """Where the program is float32, as `sample` runs it; the user's setting is back behind it."""
    seen = []

    def looking(*given):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return RIGHT(*given)

    clock(cudnn=looking)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        chosen(dtype=dtype)
        assert torch.backends.cuda.matmul.allow_tf32 is True and set(seen) == {dtype == torch.bfloat16}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def raising(error):
    def call(*given):
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("No available kernel. Aborting execution."),
        torch.OutOfMemoryError("out of memory"),
        TypeError("takes 5 positional arguments"),
        AttributeError("no such op"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_refuses_is_out(clock, error):
    """Quietly, and the next is taken."""
    clock(cudnn=raising(error))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == {"flash"}


def test_what_pytorch_would_not_take_is_not_called(clock, monkeypatch):
    install = clock()
    assert chosen() == {"cudnn"}
    monkeypatch.setitem(attend.CHECKS, "cudnn", lambda params, debug: False)
    install.recorded.clear()
    assert chosen() == {"flash"} and set(install.recorded) == {FUSED, "flash", "efficient"}, "what was kept is no answer now"
    monkeypatch.setitem(attend.CHECKS, "flash", raising(TypeError("another PyTorch")))
    assert chosen() == {"efficient"}


def test_what_cannot_be_captured_is_out(clock):
    install = clock()
    install.uncaptured = {"cudnn"}
    assert chosen() == {"flash"}
    install = clock()
    install.uncaptured = {FUSED}
    assert chosen(batch=2) == {FUSED} and not install.timed, "nothing to compare with"


def like_tf32(q, k, v, scale):
    """Operands of 10 bits."""
    return RIGHT(*((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (q, k, v)), scale)


def without_the_last(q, k, v, scale):
    a = RIGHT(q, k, v, scale).clone()
    a[:, :, -1] = 0
    return a


def of_one_image(q, k, v, scale):
    """Zeros for the others."""
    return RIGHT(q, k, v, scale) * (torch.arange(len(q)) == 0)[:, None, None, None]


def escaping():
    """Runs while it is recorded, and not when it is replayed."""
    known = {}
    return lambda q, k, v, scale: known.setdefault(q.shape, RIGHT(q, k, v, scale))


WRONG = {
    "NaN": lambda q, k, v, scale: RIGHT(q, k, v, scale) * float("nan"),
    "another scale": lambda q, k, v, scale: RIGHT(q, k, v, 2 * scale),
    "TF32": like_tf32,
    "one row": without_the_last,
    "one image": of_one_image,
    "zeros": lambda q, k, v, scale: torch.zeros_like(q),
}


@pytest.mark.parametrize("wrong", [*WRONG, "escaping"])
def test_what_is_wrong_is_out(clock, wrong):
    """However fast it is."""
    install = clock(cudnn=WRONG[wrong] if wrong in WRONG else escaping())
    assert chosen(batch=2) == {"flash"}
    assert "cudnn" in install.recorded and "cudnn" not in install.timed


def test_wrong_in_bfloat16(clock):
    """Its class is coarser; rounding the probabilities and sums as back ends do is right in it."""

    def rounds(q, k, v, scale):
        scores = (q @ k.mT) * scale
        return torch.softmax(scores.float(), -1).to(q.dtype) @ v

    clock(cudnn=without_the_last, flash=rounds)
    assert chosen(dtype=torch.bfloat16, batch=2) == {"flash"}


def test_weights_that_are_zeros_hide_nothing(clock):
    """Of a network that is not trained yet: choices are kept by shape, and hold for others."""
    clock(cudnn=WRONG["zeros"])
    network = awake(CONFIG)
    for module in network.modules():
        if isinstance(module, fastdiff.nn.Attention):
            torch.nn.init.zeros_(module.proj.weight)
    assert chosen(network) == {"flash"}


def test_no_memory_to_judge_by(clock, monkeypatch):
    clock()
    monkeypatch.setattr(choosing, "reference", raising(torch.OutOfMemoryError("out of memory")))
    assert chosen() == {FUSED}


def test_a_fused_op_that_fails(clock, monkeypatch):
    """It says so itself where it is run; there is nothing to compare with."""
    clock()
    steps = sys.modules["fastdiff.compile.steps"]
    monkeypatch.setattr(steps, "ATTENTION", raising(RuntimeError("no kernel image")))
    assert chosen() == {FUSED}


def test_choices_are_kept(clock, tmp_path):
    """The second program with these shapes measures none, in this process and in another; another batch is another file."""
    install = clock()
    assert chosen() == {"cudnn"}
    count = len(install.recorded)
    assert chosen() == {"cudnn"} and len(install.recorded) == count
    measured.forget()
    again = clock({"fused": 0.1} | dict.fromkeys(NAMES, 1.0))
    assert chosen() == {"cudnn"} and not again.recorded
    assert chosen(batch=2) == {FUSED}
    (path,) = tmp_path.glob("choices-*-float32-b1-*.json")
    kept = json.loads(path.read_text())["choices"]
    assert kept == {"attention of 32 by 2 x 16 at 4x4": "cudnn", "attention of 64 by 4 x 16 at 2x2": "cudnn"}
    path.write_text(path.read_text().replace("cudnn", "of another release"))
    measured.forget()
    assert chosen() == {FUSED}, "measured anew"


def test_given_choices_are_not_measured(clock):
    install = clock()
    network = awake(CONFIG)
    names = [name for name in library(network) if name.endswith("attention")]
    given = library(network) | dict.fromkeys(names, "efficient") | {names[0]: FUSED}
    algorithms = program_of(network, torch.float32, choices=given).attention_algorithms
    assert algorithms == {name: given[name] for name in algorithms} and set(algorithms.values()) == {FUSED, "efficient"}
    assert not install.recorded


def test_nothing_is_measured_on_cpus(monkeypatch, tmp_path):
    """The fused op, whatever is given; no word of attention in the file."""
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(choosing, "_measure", raising(AssertionError("measured")))
    network = awake(CONFIG)
    assert chosen(network) == {FUSED}
    names = [name for name in library(network) if name.endswith("attention")]
    program = program_of(network, torch.float32, choices=dict.fromkeys(names, "math"))
    assert set(program.attention_algorithms.values()) == {FUSED} and all(s.library is None for s in program.attentions)
    (path,) = tmp_path.iterdir()
    assert "attention" not in path.read_text()


def test_scores_are_kept_in_memory_where_they_are_few(monkeypatch):
    """Of a large image they would be many times q, k and v."""
    for name in NAMES:
        monkeypatch.setitem(attend.CHECKS, name, lambda params, debug: True)
    program = program_of(awake(CONFIG), torch.float32, choices={})
    program.network.to("meta")
    step = program.attentions[0]
    monkeypatch.setitem(choosing.TIMERS, "meta", None)
    assert choosing.candidates(step, program) == [FUSED, "efficient", "math"]
    program.sizes[step.name] = (8, 8)
    assert choosing.candidates(step, program) == [FUSED, "efficient"]
    program.dtype = torch.bfloat16
    assert choosing.candidates(step, program) == [FUSED, *NAMES]


def test_the_callers_random_numbers_are_left_alone(clock):
    clock()
    network = awake(CONFIG)
    state = torch.get_rng_state()
    chosen(network)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_programs(clock, name, dtype):
    """Norms with statistics and without, several heads, scaled skips: at most twice the error with the fused op."""
    clock()
    network = awake(NETWORKS[name])
    fused = program_of(network, dtype, choices=library(network) | dict.fromkeys(library(network), FUSED))
    given = library(network) | {n: "cudnn" for n in fused.attention_algorithms}
    program = program_of(network, dtype, choices=given)
    assert set(program.attention_algorithms.values()) <= {"cudnn"}
    x, t, labels = inputs(network.config)
    with torch.inference_mode():
        truth = copy.deepcopy(network).double()(x.double(), t.double(), labels)
    expected, got = fused(x, t, labels), program(x, t, labels)
    errors = [float((y.double() - truth).norm() / truth.norm()) for y in (expected, got)]
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps and (errors[1] <= 2e-5 or dtype != torch.float32)
    assert torch.equal(expected, got) == (not program.attentions)


def test_saved_programs_keep_their_choices(clock, tmp_path):
    """And files from before there were any are read: their attention is measured."""
    clock()
    compiled = fastdiff.compile(model_of("ddpmpp"))
    path = tmp_path / "fast.safetensors"
    compiled.save(path)
    assert set(compiled.program.attention_algorithms.values()) == {"cudnn"}
    measured.forget()
    install = clock({"fused": 0.1} | dict.fromkeys(NAMES, 1.0))
    again = fastdiff.load(path)
    assert again.program.attention_algorithms == compiled.program.attention_algorithms and not install.recorded
    assert torch.equal(fastdiff.sample(again, 2, seeds=range(2)), fastdiff.sample(compiled, 2, seeds=range(2)))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    description = json.loads(header["__metadata__"]["fastdiff"])
    del description["program"]["attention"]
    header["__metadata__"]["fastdiff"] = json.dumps(description)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    for file in tmp_path.glob("choices-*"):
        file.unlink()
    measured.forget()
    older = fastdiff.load(path).program
    assert older.algorithms == compiled.program.algorithms and set(older.attention_algorithms.values()) == {FUSED}
    assert install.recorded


def test_a_gpu_is_named(monkeypatch):
    """In what choices and saved programs are known by; a CPU's are known as they always were."""
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92100)
    plain = measured.choices(torch.float32, 8)
    known = {"fastdiff", "torch", "native", "build", "processor", "threads", "dtype", "batch"}
    assert set(plain.about) == known and measured.choices(torch.float32, 8, torch.device("cpu")) is plain
    one, two = (measured.choices(torch.float32, 8, torch.device("cuda", i)) for i in (0, 1))
    assert one.about == plain.about | {"gpu": measured.gpu(torch.device("cuda", 0))}
    assert len({plain.name, one.name, two.name}) == 3
    assert one.about["gpu"].startswith(f"GPU 0, 9.0, CUDA {torch.version.cuda}, cuDNN 92100, ")
    assert len(one.about["gpu"].rpartition("kernels ")[2]) == 16
    assert set(store.machine(torch.device("cpu"))) == {"fastdiff", "native", "packing"}
    assert store.machine(torch.device("cuda", 0)) != store.machine(torch.device("cuda", 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to capture and time on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype, monkeypatch, tmp_path):
    """Every shape gets an answer; the program's error is that of the fused op's, and the flags are the user's still."""
    monkeypatch.setattr(measured, "_tables", {})
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    config = dataclasses.replace(CONFIG, resolution=32, channels=64, attention=(16, 8), head_channels=64, groups=32)
    network = awake(config).cuda()
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.matmul.allow_tf32)
    program = program_of(network, dtype, 8)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.matmul.allow_tf32) == before
    known = measured.choices(dtype, 8, program.device).known
    assert set(program.attention_algorithms.values()) == set(known.values()) and len(known) == 2
    given = [None if t is None else t.cuda() for t in inputs(config, 8)]
    fused = program_of(network, dtype, 8, choices=dict.fromkeys(program.attention_algorithms, FUSED))
    expected, got = fused(*given), program(*given)
    assert (got - expected).norm() <= (2e-5 if dtype == torch.float32 else 4 * 2**-8) * expected.norm()

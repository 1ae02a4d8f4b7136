"""The loop as graphs: a plan captured once for each batch size, replayed with other seeds, labels and guidance weights.

Plans of at most `WHOLE` evaluations, initial noise included, are one graph; longer ones one graph for each kind of row,
since rows of a kind differ only in what they read from the plan's table on the device. Batches are padded to the next
bucket.
"""

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.flags import autotuned
from fastdiff.plan import Loop, Plan, Row, execute, prepare
from fastdiff.stepwise import Guidance

WHOLE = 8  # evaluations
KEPT = 4  # captured (plan, batch) pairs; each holds its buffers
STEP = 64  # buckets are powers of two below it and multiples of it beyond

_capturing = threading.Lock()  # PyTorch captures one graph at a time in a process; other threads may go on meanwhile


class Backend(Protocol):
    """What captures: CUDA graphs, or a stand-in for tests."""

    def record(self, call: Callable[[], None], reset: Callable[[], object]) -> Callable[[], None]:
        """Run call to warm up, reset(), capture it; what replays it. Raises torch.OutOfMemoryError."""

    def cost(self, call: Callable[[], object]) -> int:
        """Bytes that call needs at its peak beyond what is held."""

    def free(self) -> int:
        """Bytes that are free."""


class CudaGraphs:
    """torch.cuda.CUDAGraph, all graphs of one engine in one memory pool."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def record(self, call, reset):
        side = torch.cuda.Stream(self.device)  # captures too: torch.cuda.graph's own is on the first GPU it served
        side.wait_stream(torch.cuda.current_stream(self.device))
        with _capturing, torch.cuda.device(self.device), autotuned():  # warming up measures; what is captured remembers
            with torch.cuda.stream(side):
                call()
                reset()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                call()
        reset()
        return graph.replay

    def cost(self, call):
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def bucket(batch: int) -> int:
    """The smallest size that is captured and holds the batch."""
    return 1 << (batch - 1).bit_length() if batch < STEP else -(-batch // STEP) * STEP


def _padded(t: Tensor, size: int) -> Tensor:
    return torch.cat((t, t[-1:].expand(size - len(t), *t.shape[1:])))


class Session:
    """One plan at one batch size: static inputs and buffers, and the graphs that read and write them."""

    def __init__(self, plan: Plan, network, seeds: Tensor, shape, labels, dtype, guidance, backend: Backend):
        self.plan, self.shape, self.dtype = plan, shape, dtype
        self.seeds, self.labels, self.guidance = seeds.clone(), None if labels is None else labels.clone(), guidance
        self.buffers = self._fresh()
        self.loop = Loop(plan, network, self.seeds, self.labels, self.buffers, guidance, None, None)
        self.lock = threading.Lock()
        self.replays: dict[object, Callable[[], None]] = {}
        if plan.nfe <= WHOLE:
            self.replays["whole"] = backend.record(self._whole, lambda: None)
            return
        for i, row in enumerate(plan.rows):
            if _kind(row) not in self.replays:
                self.buffers.row.fill_(i)
                reset = functools.partial(self.buffers.row.fill_, i)
                self.replays[_kind(row)] = backend.record(functools.partial(self.loop.step, i), reset)

    def _fresh(self, x_T: Tensor | None = None, start: Tensor | None = None):
        copies = self.guidance.copies if self.guidance else 1
        return prepare(self.plan, self.seeds, self.shape, self.dtype, x_T, start=start, copies=copies)

    def _begin(self, x_T: Tensor | None = None, start: Tensor | None = None) -> None:
        for name, value in vars(self._fresh(x_T, start)).items():
            getattr(self.buffers, name).copy_(value)

    def _whole(self) -> None:
        self._begin()
        for i in range(len(self.plan.rows)):
            self.loop.step(i)

    def run(self, seeds: Tensor, labels, guidance: Guidance | None, x_T=None, start=None) -> Tensor:
        """x0 for these seeds: the inputs are copied to where the graphs read them."""
        with self.lock:
            size, own = len(self.seeds), self.guidance
            self.seeds.copy_(_padded(seeds, size))
            if labels is not None:
                self.labels.copy_(_padded(labels, size))  # type: ignore[union-attr]
            if guidance is not None and own is not None:
                # the loop's copy of the weight is what the graphs read
                assert self.loop.guidance is not None
                self.loop.guidance.weight.copy_(guidance.weight if len(own.weight) == 1 else _padded(guidance.weight, size))
                if own.without is not None and guidance.without is not None:
                    own.without.copy_(_padded(guidance.without, size))
            if "whole" in self.replays and x_T is None and start is None:
                self.replays["whole"]()
            else:
                given = [None if t is None else _padded(t, size) for t in (x_T, start)]
                self._begin(*given)
                self._rows()
            return self.buffers.x[: len(seeds)].clone()

    def _rows(self) -> None:
        for i, row in enumerate(self.plan.rows):
            replay = self.replays.get(_kind(row))
            replay() if replay is not None else self.loop.step(i)


def _kind(row: Row) -> tuple:
    return row.evaluate, row.langevin is not None


class Graphs:
    """`plan.execute` by captured graphs, at most `KEPT` sessions; what cannot be captured runs step by step."""

    def __init__(self, backend: Backend):
        self.backend, self.lock = backend, threading.Lock()
        self.sessions: OrderedDict[tuple, Session] = OrderedDict()
        self.too_large: set[tuple] = set()

    def execute(
        self,
        plan: Plan,
        network: Callable[..., Tensor],
        seeds: Tensor,
        shape: Sequence[int],
        labels: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        x_T: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
        start: Tensor | None = None,
        guidance: Guidance | None = None,
        adjust=None,
        on_row=None,
    ) -> Tensor:
        """As `plan.execute`."""
        size = bucket(len(seeds))
        weights = None if guidance is None else (len(guidance.weight), guidance.interval, id(guidance.network))
        table, codes = plan.tables()
        key = (plan.name, table.tobytes(), codes.tobytes(), plan.norms, size, dtype, tuple(shape), labels is None, weights)
        plain = noise is None and adjust is None and on_row is None and plan.revise is None and bool(plan.rows)
        if plain and key not in self.too_large:
            session = self._session(key, plan, network, seeds, shape, labels, dtype, guidance, size)
            if session is not None:
                return session.run(seeds, labels, guidance, x_T, start)
        given = {"x_T": x_T, "noise": noise, "start": start, "guidance": guidance, "adjust": adjust, "on_row": on_row}
        return execute(plan, network, seeds, shape, labels, dtype=dtype, **given)

    def describe(self) -> str:
        """Which batches run as graphs, and how many cannot."""
        with self.lock:
            sizes = sorted({len(session.seeds) for session in self.sessions.values()})
            steps = f"; {len(self.too_large)} step by step, out of memory" if self.too_large else ""
            return f"captured for batches of {', '.join(map(str, sizes)) or 'none'}{steps}"

    def _session(self, key, plan, network, seeds, shape, labels, dtype, guidance, size) -> Session | None:
        with self.lock:
            if key not in self.sessions:
                given = (_padded(seeds, size), shape, None if labels is None else _padded(labels, size), dtype)
                padded = None if guidance is None else _static(guidance, size)
                try:
                    self.sessions[key] = Session(plan, network, *given, padded, self.backend)
                except torch.OutOfMemoryError:
                    self.too_large.add(key)
                    self._warn(len(seeds), lambda: execute(plan, network, seeds[:1], shape, _first(labels), dtype=dtype))
                    return None
                while len(self.sessions) > KEPT:
                    self.sessions.popitem(last=False)
            self.sessions.move_to_end(key)
            return self.sessions[key]

    def _warn(self, batch: int, one: Callable[[], object]) -> None:
        fits = self.backend.free() // max(1, self.backend.cost(one))
        fits = max(1, min(fits, batch - 1))
        fits = fits // STEP * STEP or 1 << (fits.bit_length() - 1)
        warnings.warn(
            f"batch_size: capturing {batch} images at once ran out of memory, so they are computed step by step; "
            f"batch_size={fits} would fit",
            stacklevel=5,
        )


def _first(t: Tensor | None) -> Tensor | None:
    return None if t is None else t[:1]


def _static(guidance: Guidance, size: int) -> Guidance:
    """The guidance with tensors of its own, of the captured size."""
    weight = guidance.weight if len(guidance.weight) == 1 else _padded(guidance.weight, size)
    without = None if guidance.without is None else _padded(guidance.without, size)
    return Guidance(weight.clone(), without, guidance.network, guidance.interval)

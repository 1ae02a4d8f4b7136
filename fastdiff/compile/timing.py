"""How long steps take on a GPU: in CUDA graphs, as sampling replays them, so that no work of the host is in it."""

import statistics
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from fastdiff.compile.graph import CudaGraphs

CALLS = 8  # of a step in one graph, whose launch takes the host some microseconds
REPLAYS = 4  # of the graph between two events
ROUNDS, LEAST = 9, 3  # at most and at least, between which
SECONDS = 0.25  # spent in all end them


class Timer(Protocol):
    """What times calls on one device: CUDA graphs, or a stand-in for tests."""

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        """What replays the call. Raises what the call raises, and RuntimeError where it cannot be captured."""

    def seconds(self, replay: Callable[[], None]) -> float:
        """Of one call in what `record` gave."""


class GraphTimer:
    """CUDA graphs between two events."""

    def __init__(self, device: torch.device):
        self.device, self.graphs = device, CudaGraphs(device)

    def record(self, call):
        def calls() -> None:
            for _ in range(CALLS):
                call()

        with torch.cuda.device(self.device):
            return self.graphs.record(calls, lambda: None)

    def seconds(self, replay):
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                replay()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / (1000 * REPLAYS * CALLS)


TIMERS: dict[str, Callable[[torch.device], Timer]] = {"cuda": GraphTimer}  # elsewhere attention is not measured


def medians(timer: Timer, replays: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each: the median of rounds in which they take turns, after one in which the GPU's clocks rise."""
    taken: dict[str, list[float]] = {name: [] for name in replays}
    for i in range(ROUNDS + 1):
        for name, replay in replays.items():
            taken[name].append(timer.seconds(replay))
        if i >= LEAST and CALLS * REPLAYS * sum(map(sum, taken.values())) > SECONDS:
            break
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}

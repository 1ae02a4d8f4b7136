"""What the sampler adds to the network's time in a 1000-step DDPM run of the packaged model; what deterministic=True costs.

python benchmarks/sampler_cost.py [--nfe 1000] [--batches 1 8] [--threads 1]
"""

import argparse
import time

import torch

import fastdiff
from fastdiff import invariant
from fastdiff.sample import run


class Timed(torch.nn.Module):
    """A network and the seconds spent in it."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seconds = network, 0.0

    def forward(self, *args):
        begin = time.perf_counter()
        out = self.network(*args)
        self.seconds += time.perf_counter() - begin
        return out


def share(model, nfe: int, batch: int) -> None:
    """Time of a whole run against time in its network."""
    network = Timed(model.network)
    timed = fastdiff.Model(network, model.schedule, model.prediction, model.family, model.shape, model.labels)
    request = {"seeds": range(batch), "sampler": "ddpm", "batch_size": batch, "progress": False}
    run(timed, 3, **request)
    network.seconds = 0.0
    seconds = run(timed, nfe, **request).seconds
    added = seconds - network.seconds
    print(
        f"ddpm, {nfe} steps, batch {batch}: {seconds:.2f} s, {network.seconds:.2f} s of them in the network; "
        f"the sampler adds {added / network.seconds:.2%}, {added / nfe * 1e6:.0f} us a step"
    )


def alone(model, batch: int, repeats: int = 5) -> None:
    """A network call on a batch, as it is and one image at a time."""
    x = torch.randn(batch, *model.shape).contiguous(memory_format=torch.channels_last)
    c_noise, labels = torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
    one = invariant.Invariant(model.network)
    one.whole = {(tuple(x.shape), x.stride(), x.dtype): False}
    best = []
    with torch.inference_mode():
        for call in (model.network, one):
            times = []
            for _ in range(repeats):
                begin = time.perf_counter()
                call(x, c_noise, labels)
                times.append(time.perf_counter() - begin)
            best.append(sorted(times)[len(times) // 2])
    print(f"deterministic=True, batch {batch}: {best[0] * 1e3:.1f} ms whole, {best[1] * 1e3:.1f} ms one at a time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, default=1000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = fastdiff.load("mnist-edm")
    model.network.eval()
    for batch in given.batches:
        share(model, given.nfe, batch)
    alone(model, 64)


if __name__ == "__main__":
    main()

"""deterministic=True: bit-identical images in batches of 1 to 64, also from networks whose libraries look at the batch."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.invariant import Invariant
from fastdiff.schedules import EDM

SHAPE = (3, 16, 16)


class Plain(nn.Module):
    """PyTorch's own layers, at sizes where their libraries take other algorithms for other batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.out = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 3, 1)
        self.condition, self.labels = nn.Linear(1, 40), nn.Embedding(4, 40)
        self.mix = nn.Linear(40, 40)

    def forward(self, x, c_noise, labels):
        h = self.mix(torch.tanh(self.condition(c_noise[:, None]) + self.labels(labels)))
        return self.out(torch.tanh(self.inside(x) + h[..., None, None]))


def model():
    return fastdiff.wrap(Plain(), schedule=EDM(), prediction="edm", shape=SHAPE, labels=3, precondition=True)


@pytest.mark.parametrize(
    ("sampler", "options", "sizes"),
    [
        ("heun", {"nfe": 5}, (1, 2, 3, 16, 64)),
        ("heun", {"nfe": 3, "guidance": fastdiff.Guide(2.0, null_label=3)}, (1, 5, 64)),
        ("predictor-corrector", {"nfe": 6}, (1, 5, 16)),
        ("sde-dpm-solver++2m", {"nfe": 5}, (1, 5, 16)),
        ("rk45", {"rtol": 0.1, "atol": 0.1}, (1, 5)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bits(sampler, options, sizes):
    asked = model()
    if sampler == "predictor-corrector":
        asked.schedule = fastdiff.schedules.VE()
    request = {"seeds": range(max(sizes)), "sampler": sampler, "deterministic": True, **options}
    images = [fastdiff.sample(asked, batch_size=size, **request) for size in sizes]
    for size, other in zip(sizes[1:], images[1:], strict=True):
        assert torch.equal(other, images[0]), f"batches of {size}"


def test_it_looks():
    """Where the batch changes bits, images go one at a time; where it does not, one extra look and whole batches."""

    class Coupled(nn.Module):
        """Rounds by the batch, as libraries do."""

        def forward(self, x, c_noise):
            calls.append(len(x))
            return x * (1 + 1e-7 * (len(x) > 1))

    calls: list[int] = []
    x, t = torch.randn(4, 1, 2, 2), torch.ones(4)
    network = Invariant(Coupled())
    for _ in range(2):
        assert torch.equal(network(x, t), x)
    assert calls == [1, 1, 1, 1, 4, 1, 1, 1, 1]
    calls.clear()
    network = Invariant(lambda x, t: (calls.append(len(x)), 2 * x)[1])
    for _ in range(3):
        network(x, t)
    assert calls == [1, 1, 1, 1, 4, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_packaged_model(threads):
    """Bits of the packaged model, with any number of threads; no image goes alone there, see fastdiff.nn."""
    code = f"""
import torch, fastdiff
torch.set_num_threads({threads})
model = fastdiff.load("mnist-ect")
images = [fastdiff.sample(model, 2, seeds=range(64), batch_size=size, deterministic=True) for size in (1, 16, 64)]
assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
plain = [fastdiff.sample(model, 2, seeds=range(64), batch_size=size, compile="off") for size in (16, 64)]
assert torch.equal(plain[0], plain[1]) and torch.equal(plain[0], images[0])
programs = [fastdiff.sample(model, 2, seeds=range(64), batch_size=size) for size in (1, 16, 64)]
assert torch.equal(programs[0], programs[1]) and torch.equal(programs[0], programs[2])
assert (programs[0] - plain[0]).abs().max() <= 1e-3  # rounding of x at t = 80, through the network's last layers
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_on_cpus():
    with pytest.raises(ValueError, match="deterministic: bits are promised on CPUs, not on meta; leave it out"):
        fastdiff.sample(model(), 3, seeds=[0], device="meta", deterministic=True)

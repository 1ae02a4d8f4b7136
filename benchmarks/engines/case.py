"""What every engine computes: a network with random weights, its inputs, and the truth of one evaluation."""

import copy
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastdiff
from fastdiff import UNet, UNetConfig, schedules
from fastdiff.layers import initialise
from fastdiff.nn import GroupNormSiLU

NETS = {
    "ddpm-cifar10": UNetConfig(dropout=0.0),
    "edm-cifar10": UNetConfig.ddpmpp(dropout=0.0),
    "adm-imagenet64": UNetConfig.adm(dropout=0.0),
    "smallest": UNetConfig(resolution=8, channels=32, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0),
}
TIMES = (500.0, 20.0)  # c_noise of the evaluations, in turn
STEP = -0.5  # of the update between evaluations


class PlainGroupNormSiLU(nn.Module):
    """The same arithmetic in PyTorch's own ops."""

    def __init__(self, norm: GroupNormSiLU):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.silu = norm.groups, norm.eps, norm.silu

    def forward(self, x, add=None, scale=None, shift=None):
        x = x if add is None else x + add[:, :, None, None]
        y = functional.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        y = y if scale is None else y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return functional.silu(y) if self.silu else y


def plain_network(network: nn.Module) -> nn.Module:
    """A copy of the U-Net without a single fastdiff op, which any exporter can read."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, GroupNormSiLU):
                setattr(module, name, PlainGroupNormSiLU(child))
    return network


class Embedded(nn.Module):
    """The network from its embedding on: (x, e) -> F."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        network.embed = lambda e, labels, augment: e

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.network(x, e)


@dataclasses.dataclass
class Case:
    """One cell of the matrix; `folder` keeps exported networks between runs."""

    net: str
    batch: int
    folder: Path

    @property
    def config(self) -> UNetConfig:
        return NETS[self.net]

    @property
    def key(self) -> str:
        """Of what is kept between runs: another release may draw other random weights."""
        return f"{self.net}-{_drawn(self.net)}-b{self.batch}"

    def network(self) -> UNet:
        """The same random weights every time, drawn once a process; branches that start at zero are awake."""
        return _network(self.net)

    def model(self) -> fastdiff.Model:
        """The network as a model of fastdiff."""
        return fastdiff.wrap(self.network(), schedule=schedules.DDPM(), prediction="eps", precondition=True)

    def plain(self) -> Embedded:
        return Embedded(plain_network(self.network())).eval()

    def x(self) -> Tensor:
        c = self.config
        return torch.randn(self.batch, c.in_channels, c.resolution, c.resolution, generator=torch.Generator().manual_seed(1))

    def labels(self) -> Tensor | None:
        return torch.arange(self.batch) % self.config.labels if self.config.labels else None

    def embeddings(self) -> list[Tensor]:
        """[B, embedding width] of each of TIMES."""
        network = self.network()
        with torch.inference_mode():
            return [network.embed(torch.full((self.batch,), t), self.labels()).clone() for t in TIMES]

    def exported(self, name: str) -> Path:
        """Where an engine keeps its form of the network."""
        return self.folder / f"{self.key}-{name}"

    def truth(self) -> Tensor:
        """The first evaluation in float64, one image at a time; computed once."""
        path = self.folder / f"{self.key}-truth.pt"
        if not path.is_file():
            network, x = plain_network(self.network()).double(), self.x().double()
            e = self.embeddings()[0].double()
            network.embed = lambda e, labels, augment: e
            with torch.inference_mode():
                parts = [network(x[i : i + 1], e[i : i + 1]) for i in range(self.batch)]
            torch.save(torch.cat(parts), path)
        return torch.load(path, weights_only=True)

    def operations(self) -> float:
        """Multiplications and additions of one image's evaluation, counted by the program that computes it."""
        from fastdiff.compile.program import Program

        with torch.device("meta"):
            network = UNet(self.config)
        resolution = self.config.resolution
        return Program(network, torch.float32, (resolution, resolution)).operations


@functools.lru_cache(maxsize=1)
def _network(net: str) -> UNet:
    torch.manual_seed(0)
    network = UNet(NETS[net])
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.any():
            initialise(module)
    return network.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def _drawn(net: str) -> str:
    """A digest of the weights, a few of each."""
    looks = [p.detach().flatten()[:4].tolist() for p in _network(net).parameters()]
    return hashlib.sha256(json.dumps(looks).encode()).hexdigest()[:8]


def onnx_file(case: Case) -> Path:
    """The network as ONNX, exported once."""
    path = case.exported("net.onnx")
    if not path.is_file():
        partial = path.with_suffix(".part")
        torch.onnx.export(case.plain(), (case.x(), case.embeddings()[0]), str(partial), input_names=["x", "e"],
                          output_names=["y"], dynamo=True, external_data=True, verbose=False)  # fmt: skip
        import onnx

        model = onnx.load(str(partial))
        onnx.save(model, str(path), save_as_external_data=True, location=path.name + ".data")
        for leftover in case.folder.glob(partial.name + "*"):
            leftover.unlink()
    return path


def describe(error: BaseException) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"

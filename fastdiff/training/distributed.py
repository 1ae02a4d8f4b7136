"""Several processes, one run: each takes its share of every batch, and gradients are averaged.

`torchrun --nproc_per_node N -m fastdiff train ...` starts them; gloo joins CPUs, NCCL GPUs. Noise, times and order belong
to the image's position in the run, so N processes make the steps that one would make at the whole batch.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**25  # numbers that are joined to one message


@dataclasses.dataclass(frozen=True)
class Group:
    """This process' place among `world` processes."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """True for the one that writes files and talks."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= BUCKET:
                self._average(bucket)
                bucket = []
        self._average(bucket)

    def _average(self, bucket: list[Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([t.numel() for t in bucket])
        torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def average_gradients(self, network: nn.Module) -> None:
        """Gradients that a process has not are zeros: all must send the same."""
        if self.world == 1:
            return
        for p in network.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.average(p.grad for p in network.parameters() if p.grad is not None)

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        if self.world == 1:
            return flag
        told = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """The group that torchrun describes in the environment, and this process' own device; a group of one without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), world), device
    finally:
        dist.destroy_process_group()

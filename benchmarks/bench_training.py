"""A training step of DDPM's CIFAR-10 network: the trainer, fused, against diffusers' UNet2DModel under torch.compile.

    pytest benchmarks/bench_training.py                             # speed, and the shares of data and averages
    python benchmarks/bench_training.py --memory fastdiff           # peak resident memory of a few steps; also: diffusers

Both sides do a whole step at equal dtype: images from bytes, noise, forward, backward, clipping, Adam, one moving average.
diffusers' side is written with PyTorch's fastest words (torch.compile, fused Adam, foreach average), so that only
the network and the noising differ. FASTDIFF_TRAIN_BATCH sets the images of a step.
"""

import argparse
import dataclasses
import os
import resource
import tempfile
import time

import pytest
import torch

import fastdiff
from fastdiff.training import PRESETS, ImageData, Trainer

BATCH = int(os.environ.get("FASTDIFF_TRAIN_BATCH", 4 if not torch.cuda.is_available() else 128))
PARAMETERS = 35_746_307
STEPS = 3  # of the measurement of memory


def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(torch.randint(0, 256, (50_000, 3, 32, 32), generator=generator, dtype=torch.uint8), None)


def fused(device: str, bf16: bool, compiled: bool = False) -> Trainer:
    config = dataclasses.replace(PRESETS["cifar10-ddpm"], batch=BATCH, flip=False, bf16=bf16, compile=compiled)
    return Trainer(config, images(), tempfile.mkdtemp(), device=device, checkpoint_every=0, report_every=0, progress=False)


class Peer:
    """The same step with diffusers' network."""

    def __init__(self, device: str, bf16: bool, compiled: bool = True):
        from diffusers import DDPMScheduler, UNet2DModel

        torch.manual_seed(0)
        self.network = UNet2DModel(
            sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, dropout=0.1, norm_eps=1e-6,
            norm_num_groups=32, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        self.network.to(device).to(memory_format=torch.channels_last).train()
        self.forward = torch.compile(self.network) if compiled else self.network
        self.scheduler, self.data = DDPMScheduler(), images().to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=2e-4, fused=True)
        self.ema = [p.detach().clone() for p in self.network.parameters()]
        self.device, self.bf16, self.position = torch.device(device), bf16, 0

    def step(self) -> float:
        x0, _ = self.data.batch(self.position, BATCH, self.device)
        self.position += BATCH
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (BATCH,), device=self.device)
        noisy = self.scheduler.add_noise(x0, noise, t).to(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = torch.nn.functional.mse_loss(self.forward(noisy, t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, list(self.network.parameters()), 1e-4)
        return float(loss.detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step(compare, device, dtype, missing):
    bf16, why = dtype == "bfloat16", missing("diffusers")
    if bf16 and device == "cpu" and not fastdiff.training.checks.has_bf16(torch.device("cpu")):
        pytest.skip("this CPU has no bfloat16 products")
    trainer = fused(device, bf16)
    variants = {"fastdiff": trainer._one_step}
    peer = None
    if why is None:
        peer, eager = Peer(device, bf16), Peer(device, bf16, compiled=False)
        variants |= {"pytorch": eager.step, "diffusers compiled": peer.step}

    def check():
        """Both networks are the same function with the same gradient: diffusers' weights in ours, dropout off."""
        if peer is None:
            return
        network = fastdiff.load(peer.network).network.to(device)
        for p in network.parameters():
            p.requires_grad_(True)
        assert (
            sum(p.numel() for p in network.parameters())
            == PARAMETERS
            == sum(p.numel() for p in trainer.network.parameters())
        )
        x, t = torch.randn(1, 3, 32, 32, device=device), torch.tensor([500.0], device=device)
        peer.network.eval()
        one, two = network.eval()(x, t), peer.network(x, t).sample
        # float32 convolutions of some 60 layers
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        one.square().sum().backward()
        two.square().sum().backward()
        both = (network, peer.network)
        norms = [torch.stack([p.grad.norm() for p in n.parameters() if p.grad is not None]).norm() for n in both]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=0)
        peer.network.train()
        peer.optimizer.zero_grad(set_to_none=True)

    skipped = {} if why is None else {"diffusers compiled": why}
    compare("training step", f"DDPM CIFAR-10, {dtype}, batch {BATCH}", variants, check, images=BATCH, skipped=skipped)


def test_shares(device, timed, capsys):
    """What data and averages take of a step; asked are 3 % at most."""
    trainer = fused(device, device == "cuda")
    position = iter(range(0, 10**9, BATCH))
    seconds = timed(
        {
            "step": trainer._one_step,
            "data": lambda: trainer._batch(next(position), 0),
            "averages": lambda: trainer.ema.update(10**6, BATCH),
        },
        rounds=3,
    )
    with capsys.disabled():
        shares = {name: seconds[name] / seconds["step"] for name in ("data", "averages")}
        print(f"\nstep {1e3 * seconds['step']:.1f} ms: " + ", ".join(f"{k} {v:.2%}" for k, v in shares.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=("fastdiff", "diffusers"), required=True)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = fused(device, args.bf16)._one_step if args.memory == "fastdiff" else Peer(device, args.bf16).step
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    took, mib = time.perf_counter() - start, 2**20
    print(
        f"{args.memory}: peak {peak / mib:,.0f} MiB at batch {BATCH}, {before * 1024 / mib:,.0f} MiB before the first step"
    )
    print(f"{STEPS} steps in {took:.1f} s, compilation included")


if __name__ == "__main__":
    main()

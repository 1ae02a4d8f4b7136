"""The trainer: one loop for every loss, with EMA, exact resume and atomic checkpoints.

Everything random is a function of (seed, image position): the order of the data, noise, times, and dropout, whose
generator is seeded anew each step. So a checkpoint holds no generator state and a resumed run repeats an uninterrupted
one bit for bit on a CPU.
"""

import contextlib
import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import ops
from fastdiff.model import Model, atomically
from fastdiff.training import losses
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import ImageData
from fastdiff.training.losses import Batch
from fastdiff.training.report import LossLog, sample_grid
from fastdiff.unet import UNet

OPTIMIZERS = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step, the last good checkpoint and the likely cause."""


class Trainer:
    """Trains `config` on `data`, keeping everything in the folder `out`.

    out/state.pt: newest checkpoint; out/model.safetensors: EMA weights as a `Model`; out/loss.csv, out/loss.png: the
    loss; out/samples-<images>.png: grids. A run that is started again in the same folder continues.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        out: str | Path,
        *,
        init: Model | None = None,
        device: str | torch.device = "cpu",
        checkpoint_every: int = 25_600,  # images
        report_every: int = 51_200,  # images; 0: never
        info: dict | None = None,
        progress: bool = True,
    ):
        self.config, self.data, self.out, self.device = config, data, Path(out), torch.device(device)
        self.checkpoint_every, self.report_every, self.info = checkpoint_every, report_every, info or {}
        self.progress, self.step, self._stop = progress, 0, False
        self.loss = losses.create(config.loss, config.schedule, config.prediction, config.options)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.network = UNet(config.network)
        if init is not None:
            self._initialise(init)
        self.network.to(self.device).to(memory_format=torch.channels_last).train()
        self.loss.start(self.network)
        self.ema: list[Tensor] = [p.detach().clone() for p in self.network.parameters()]
        self.optimizer = OPTIMIZERS[config.optimizer](self.network.parameters(), lr=config.lr, betas=(0.9, 0.99))
        self.log = LossLog(self.out)
        self._resume()

    def _initialise(self, init: Model) -> None:
        if not isinstance(init.network, UNet) or init.network.config != self.config.network:
            raise ValueError("init: its network is not the one to be trained; use a checkpoint of the same architecture")
        self.network.load_state_dict(init.network.state_dict())

    @property
    def images(self) -> int:
        """Training images seen so far."""
        return self.step * self.config.batch

    def train(self, until: int | None = None) -> Model:
        """Run to the end (or to step `until`), write the model and return it. Ctrl-C and SIGTERM save first."""
        last = min(self.config.steps, until or self.config.steps)
        bar = tqdm(total=self.config.steps * self.config.batch, initial=self.images, unit="img", disable=not self.progress)
        with self._signals(), bar:
            while self.step < last and not self._stop:
                self._one_step()
                bar.update(self.config.batch)
                bar.set_postfix(loss=f"{self.log.smooth:.4f}", refresh=False)
                self._housekeeping()
        self.save()
        if self._stop:
            raise KeyboardInterrupt(f"stopped at step {self.step}; the same command continues from {self.out / 'state.pt'}")
        model = self.model()
        model.save(self.out / "model.safetensors")
        return model

    def _one_step(self) -> None:
        config, position = self.config, self.images
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(position)
        batch = self._batch(position)
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            loss = self.loss(self.network, batch).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        value = float(loss.detach())
        self._check(value, float(norm))
        self.optimizer.step()
        self.loss.after_step(self.network, batch.progress)
        self.step += 1
        self._update_ema()
        self.log.add(self.step, self.images, value)

    def _batch(self, position: int) -> Batch:
        x0, labels = self.data.batch(position, self.config.batch)
        base = (self.config.seed << 40) + position
        seeds = ops.seed_tensor(range(base, base + len(x0)))
        labels = labels.to(self.device) if labels is not None and self.config.network.labels else None
        x0 = x0.to(self.device)
        return Batch(x0, seeds, labels, position / (self.config.steps * self.config.batch))

    def _lr(self, position: int) -> float:
        config = self.config
        rise = min(1.0, (position + config.batch) / max(config.warmup, 1))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / config.steps)) if config.decay else 1.0
        return config.lr * rise * fall

    @torch.no_grad()  # or the averages would hold the graph of every step, and no resumed run could update them
    def _update_ema(self) -> None:
        halflife = min(self.config.ema_halflife, 0.05 * self.images)
        torch._foreach_lerp_(self.ema, list(self.network.parameters()), 1 - 0.5 ** (self.config.batch / halflife))

    def _check(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        state = self.out / "state.pt"
        kept = f"the last good checkpoint is {state}" if state.exists() else "no checkpoint was written yet"
        raise TrainingError(
            f"step {self.step}: loss {loss}, gradient norm {norm}. Training diverged; {kept}. Likely the learning rate "
            f"{self.config.lr} is too high: start again with a lower --lr in a new --out"
        )

    def _housekeeping(self) -> None:
        def due(every: int) -> bool:
            return every > 0 and self.images // every != (self.images - self.config.batch) // every

        if due(self.checkpoint_every):
            self.save()
        if due(self.report_every):
            self.log.plot()
            sample_grid(self.model(), self.out / f"samples-{self.images:08d}.png")

    @contextlib.contextmanager
    def _signals(self):
        """Finish the step in hand on SIGINT and SIGTERM, then stop."""

        def stop(*_):
            self._stop = True

        try:
            old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller's handlers stay
            old = {}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def model(self) -> Model:
        """The EMA weights as a `Model` with its provenance."""
        network = UNet(self.config.network)
        network.load_state_dict(self.network.state_dict())
        for p, e in zip(network.parameters(), self.ema, strict=True):
            p.data.copy_(e)
        c = self.config.network
        return Model(
            network=network.to(self.device).eval().requires_grad_(False),
            schedule=self.config.schedule,
            prediction=self.config.prediction,
            family=self.config.family,
            shape=(c.in_channels, c.resolution, c.resolution),
            labels=c.labels,
            times=self.config.times,
            info=self.info | {"training": self.config.to_dict(), "images": self.images},
        )

    def save(self) -> None:
        """Write out/state.pt, all of it or nothing."""
        state = {
            "config": json.dumps(self.config.to_dict(), sort_keys=True),
            "step": self.step,
            "network": self.network.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict(),
            "time": time.time(),
        }
        self.log.flush()
        atomically(self.out / "state.pt", lambda temporary: torch.save(state, temporary))

    def _resume(self) -> None:
        for unfinished in self.out.glob(".*.part"):  # of a write that a kill cut short
            unfinished.unlink()
        path = self.out / "state.pt"
        if not path.exists():
            self.log.keep(0)
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self._same_config(json.loads(state["config"]))
        self.network.load_state_dict(state["network"])
        self.ema = [e.detach() for e in state["ema"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["loss"])
        self.step = state["step"]
        self.log.keep(self.step)

    def _same_config(self, old: dict) -> None:
        new = json.loads(json.dumps(self.config.to_dict()))
        # A setting younger than the run had its default then.
        old = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | old
        changed = [f"{k}: {old[k]} there, {new[k]} now" for k in new if old[k] != new[k]]
        if changed:
            raise ValueError(
                f"out: {self.out} holds a run with other settings ({'; '.join(changed)}); "
                f"give the same settings to continue it, or another --out"
            )

"""The trainer: one loop for every loss, with averages, exact resume and several processes.

Everything random is a function of (seed, image position): the order of the data, noise, times, augmentation, and dropout,
whose generator is seeded anew each step. So a checkpoint holds no generator state, and a resumed run repeats an
uninterrupted one bit for bit on a CPU.
"""

import contextlib
import copy
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import ops
from fastdiff.denoiser import Denoiser
from fastdiff.model import Model
from fastdiff.training import augment, checkpointing, checks, losses
from fastdiff.training.checkpointing import TrainingError
from fastdiff.training.config import TrainConfig, differences
from fastdiff.training.data import ImageData
from fastdiff.training.distributed import Group
from fastdiff.training.ema import Averages
from fastdiff.training.guard import Guard
from fastdiff.training.losses import Batch
from fastdiff.training.report import Reporter, Showing
from fastdiff.unet import UNet

__all__ = ["Trainer", "TrainingError"]

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
LAG = 16  # steps of a GPU between two looks at the loss


class Trainer:
    """Trains `config` on `data`, keeping everything in the folder `out`.

    out/state.pt: newest checkpoint; out/model.safetensors: the first average as a `Model`, model-ema-<h>.safetensors the
    others; out/loss.csv and loss.png, out/samples-<images>.png, out/fd.csv and best.safetensors. A run that is started
    again in the same folder continues.

    init: weights to start from; teacher: what a distillation learns from; perceptual: a distance (a, b) -> [B] for the
    losses that name one; showing: the fields of `Showing`.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData,
        out: str | Path,
        *,
        init: Model | None = None,
        teacher: Model | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
        group: Group | None = None,
        info: dict | None = None,
        **showing: Any,
    ):
        self.config, self.out, self.device, self.group = config, Path(out), torch.device(device), group or Group()
        self.showing, self.info, self.step = Showing(**showing), info or {}, 0
        self._asked = self._stop = False  # by a signal here; agreed by all processes
        self._saved = -1  # the step of the newest checkpoint
        checks.check_config(config, self.group.world)
        checks.check_data(config, data)
        if init is not None:
            checks.check_init(config, init)
        self.data = data.to(self.device)
        self.loss = self._make_loss(teacher, perceptual)
        torch.manual_seed(config.seed)
        self.network = UNet(config.network)
        if init is not None:
            self.network.load_state_dict(init.state)
        self.network.to(self.device).train()
        self.loss.start(self.network)
        self.forward = torch.compile(self.network) if config.compile else self.network
        self.ema = Averages(self.network, config.ema, config.ema_rampup)
        fused = {} if config.optimizer == "radam" else {"fused": True}  # one pass over memory; RAdam has none
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.network.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, **fused
        )
        self.guard = Guard(LAG if self.device.type == "cuda" else 1)
        self.out.mkdir(parents=True, exist_ok=True)
        parameters = sum(p.numel() for p in self.network.parameters())
        checkpointing.enough_room(self.out, checks.bytes_of_files(config, parameters, self.showing.keep))
        self.reporter = Reporter(self.out, self.showing, self.data)
        self._resume()

    def _make_loss(self, teacher: Model | None, perceptual) -> losses.Loss:
        config, denoiser = self.config, None
        if teacher is not None:
            checks.check_teacher(config, teacher)
            network = teacher.network
            if isinstance(network, torch.nn.Module):
                network = copy.deepcopy(network).to(self.device).eval().requires_grad_(False)
            denoiser = Denoiser(network, teacher.schedule, teacher.prediction)
        return losses.create(
            config.loss, config.schedule, config.prediction, config.options, teacher=denoiser, perceptual=perceptual
        )

    @property
    def images(self) -> int:
        """Training images seen so far."""
        return self.step * self.config.batch

    def train(self, until: int | None = None) -> Model:
        """Run to the end (or to step `until`), write the model and return it. Ctrl-C and SIGTERM save first."""
        config, last = self.config, min(self.config.steps, until or self.config.steps)
        show = self.showing.progress and self.group.leads
        bar = tqdm(total=config.steps * config.batch, initial=self.images, unit="img", disable=not show)
        with self._signals(), bar:
            while self.step < last and not self._stop:
                due = self._one_step()
                bar.update(config.batch)
                if due or self._due(self.showing.checkpoint_every) or self.step == last:
                    self._settle()
                    self._stop = self.group.any(self._asked)
                    bar.set_postfix(loss=f"{self.reporter.log.smooth:.4f}", refresh=False)
                self._housekeeping()
        self.save()
        if self._stop:
            raise KeyboardInterrupt(
                f"stopped at step {self.step}; the same command continues from {self.out / checkpointing.STATE}, and so "
                f"does fastdiff resume {self.out}"
            )
        return self._finish()

    def _one_step(self) -> bool:
        """One step of the optimiser; True when the losses of the last steps should be read."""
        config, position = self.config, self.images
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(position)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            batch, network = self._batch(position, part)
            torch.manual_seed(self._generator_seed(part))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                loss = self.loss(network, batch).mean() / config.accumulate
            loss.backward()
            total += loss.detach()
        self.group.average_gradients(self.network)
        self.group.average([total])
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip or math.inf)
        due = self.guard.add(self.step, total, norm)
        if self.device.type == "cpu":  # before a bad gradient reaches the weights; a GPU's last checkpoint is good anyway
            self._settle()
        self.optimizer.step()
        self.loss.after_step(self.network, batch.progress)
        self.step += 1
        self.ema.update(self.images, config.batch)
        return due

    def _batch(self, position: int, part: int) -> tuple[Batch, Callable[..., Tensor]]:
        """This process' share of the images from `position` on, its part-th part, and the network as the loss calls it."""
        config = self.config
        count = config.batch // (self.group.world * config.accumulate)
        first = position + (self.group.rank * config.accumulate + part) * count
        x0, labels = self.data.batch(first, count, self.device)
        base = (config.seed << 40) + first
        seeds = ops.seed_tensor(range(base, base + count))
        network: Callable[..., Tensor] = self.forward
        if config.augment:
            x0, told = augment.augmented(x0, seeds.to(self.device), config.augment)
            network = _told(self.forward, told)
        elif config.flip:
            x0 = augment.flipped(x0, seeds.to(self.device))
        progress = position / (config.steps * config.batch)
        return Batch(x0, seeds, labels if config.network.labels else None, progress), network

    def _generator_seed(self, part: int) -> int:
        """Of dropout: another one for every step, process and part."""
        place = self.group.rank * self.config.accumulate + part
        return self.config.seed * 1_000_003 + self.step + (place << 44)

    def _lr(self, position: int) -> float:
        config = self.config
        rise = min(1.0, (position + config.batch) / max(config.warmup, 1))
        fall = 0.5 * (1 + math.cos(math.pi * self.step / config.steps)) if config.decay else 1.0
        return config.lr * rise * fall

    def _settle(self) -> None:
        """Read the losses that are still on the device."""
        config = self.config
        for step, loss in self.guard.settle(self.network, config.lr, config.bf16, lambda: checkpointing.kept(self.out)):
            self.reporter.loss(step + 1, (step + 1) * config.batch, loss, self.optimizer.param_groups[0]["lr"])

    def _due(self, every: int) -> bool:
        return every > 0 and self.images // every != (self.images - self.config.batch) // every

    def _housekeeping(self) -> None:
        showing = self.showing
        if self.group.leads and self._due(showing.fd_every):
            with checkpointing.room(self.out, self.step):
                self.reporter.measure(self.model(), self.step, self.images)
        if self._due(showing.checkpoint_every):
            self.save()
        if self.group.leads and self._due(showing.report_every):
            with checkpointing.room(self.out, self.step):
                self.reporter.pictures(self.model(), self.images)

    @contextlib.contextmanager
    def _signals(self):
        """Finish the step in hand on SIGINT and SIGTERM, then stop."""

        def stop(*_):
            self._asked = True

        try:
            old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller's handlers stay
            old = {}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def model(self, which: int = 0) -> Model:
        """An average of the weights as a `Model` with its provenance."""
        network = UNet(self.config.network)
        network.load_state_dict(self.network.state_dict())
        network.to(self.device)
        self.ema.copy_to(network, which)
        c, provenance = self.config.network, {"training": self.config.to_dict(), "images": self.images}
        return Model(
            network=network.eval().requires_grad_(False),
            schedule=self.config.schedule,
            prediction=self.config.prediction,
            family=self.config.family,
            shape=(c.in_channels, c.resolution, c.resolution),
            labels=c.labels,
            times=self.config.times,
            info=self.info | provenance | {"ema": self.config.ema[which], "data_fingerprint": self.data.fingerprint},
        )

    def _finish(self) -> Model:
        """Write every average; the first one is the run's model."""
        with checkpointing.room(self.out, self.step):
            if self.group.leads:
                for which, halflife in list(enumerate(self.config.ema))[1:]:
                    self.model(which).save(self.out / f"model-ema-{halflife}.safetensors")
                self.model().save(self.out / "model.safetensors")
            self.reporter.close()
        self.group.wait()
        return self.model()

    def save(self) -> None:
        """Write out/state.pt, all of it or nothing."""
        if self.group.leads and self._saved != self.step:
            state = {
                "config": json.dumps(self.config.to_dict(), sort_keys=True),
                "data": self.data.fingerprint,
                "step": self.step,
                "network": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loss": self.loss.state_dict(),
                "guard": self.guard.state_dict(),
            }
            with checkpointing.room(self.out, self.step):
                self.reporter.flush()
                checkpointing.save(self.out, state, self.showing.keep)
            self._saved = self.step
        self.group.wait()

    def _resume(self) -> None:
        state = checkpointing.read(self.out, self.device)
        if state is not None:
            self._same_run(state)
            self.network.load_state_dict(state["network"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.loss.load_state_dict(state["loss"])
            self.guard.load_state_dict(state["guard"])
            self.step = state["step"]
        if self.group.leads:
            self.reporter.resume(self.step)

    def _same_run(self, state: dict[str, Any]) -> None:
        changed = differences(json.loads(state["config"]), json.loads(json.dumps(self.config.to_dict())))
        if changed:
            raise ValueError(
                f"out: {self.out} holds a run with other settings ({'; '.join(changed)}); "
                f"give the same settings to continue it, or another --out"
            )
        if state["data"] != self.data.fingerprint:
            raise ValueError(
                f"data: the run in {self.out} was on other images (fingerprint {state['data']}, these are "
                f"{self.data.fingerprint}); give the same data to continue it, or another --out"
            )


def _told(network: Callable[..., Tensor], about: Tensor) -> Callable[..., Tensor]:
    """The network, told of the images' augmentation."""

    def call(x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return network(x, c_noise, labels, about)

    return call

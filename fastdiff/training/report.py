"""What a run shows while it goes on: tables as CSV, curves, TensorBoard, grids of samples and their distance to the data."""

import csv
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

from fastdiff.atomic import atomically
from fastdiff.metrics import Classifier, Reference, Row, evaluate
from fastdiff.model import Model
from fastdiff.training.data import ImageData

REFERENCE_IMAGES = 20_000  # of the data that samples are compared with while training
MEMORY = 0.98  # of the running mean shown


class Table:
    """Rows of numbers in a CSV file, first "step" and "images"; what an earlier start wrote is taken up."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.path, self.columns = path, ("step", "images", *columns)
        self.rows: list[tuple] = []
        self.smooth = math.nan

    def add(self, step: int, images: int, *values: float | None) -> None:
        self.rows.append((step, images, *values))
        first = values[0]
        if first is not None:
            self.smooth = first if math.isnan(self.smooth) else MEMORY * self.smooth + (1 - MEMORY) * first

    def keep(self, step: int) -> None:
        """Read the file and drop all that came after `step`."""
        if not self.path.exists():
            return
        with open(self.path, newline="") as file:
            for row in csv.DictReader(file):
                cells = [row.get(name) for name in self.columns]
                first, second = (int(c) if c and c.isdigit() else None for c in cells[:2])
                if None not in cells and first is not None and second is not None and first <= step:
                    self.add(first, second, *(_number(c) for c in cells[2:]))

    def flush(self) -> None:
        atomically(self.path, self._write)

    def _write(self, path: str) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(self.rows)


def _number(text: str | None) -> float | None:
    """As it was written, so that a table taken up is the table left alone."""
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)


def plot(table: Table, path: Path) -> None:
    """Draw the first column where matplotlib is installed (extra "train"); the CSV is there without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    window = max(len(table.rows) // 200, 1)
    chunks = [table.rows[i : i + window] for i in range(0, len(table.rows), window)]
    axes.plot([c[-1][1] for c in chunks], [sum(r[2] for r in c) / len(c) for c in chunks])
    axes.set(xlabel="training images", ylabel=f"{table.columns[2]}, mean of {window} steps", yscale="log")
    axes.grid(alpha=0.3)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def sample_grid(model: Model, path: Path, n: int = 64) -> None:
    """A PNG of n samples at the model's usual number of evaluations, always from the same seeds."""
    from fastdiff.images import save_grid
    from fastdiff.sample import sample

    save_grid(sample(model, usual_nfe(model), seeds=range(n), progress=False), path)


def usual_nfe(model: Model) -> int:
    return 2 if model.family == "consistency" else 17


@dataclasses.dataclass(frozen=True)
class Showing:
    """How a run is kept and shown. None of it changes the weights. Intervals are in images; 0: never."""

    checkpoint_every: int = 25_600
    keep: int = 1  # checkpoints that stay, the newest included
    report_every: int = 51_200  # curves and grids
    fd_every: int = 0  # distance of samples to the data, which also decides what is best
    fd_images: int = 1000
    fd_nfe: int | None = None  # None: the model's usual number
    judge: Classifier | None = None  # for fd_every
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self):
        if self.keep < 1:
            raise ValueError(f"keep: {self.keep} checkpoints let no run continue; give at least 1")
        if self.fd_every and self.judge is None:
            raise ValueError(
                "fd_every: a classifier is needed to measure with; give --classifier, of fastdiff train-classifier"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard: it is not installed; pip install tensorboard, or leave --tensorboard out")


class Reporter:
    """Writes a run's loss.csv, fd.csv, curves, grids and, where asked for, TensorBoard's events."""

    def __init__(self, out: Path, showing: Showing, data: ImageData):
        self.out, self.showing, self.data = out, showing, data
        self.log, self.fd = Table(out / "loss.csv", ("loss",)), Table(out / "fd.csv", ("fd", "agreement", "nfe"))
        self.best = math.inf
        self._reference: Reference | None = None
        self._board: Any = None

    def resume(self, step: int) -> None:
        """Go on after `step`; rows of later ones are made again."""
        self.log.keep(step)
        self.fd.keep(step)
        self.best = min((row[2] for row in self.fd.rows), default=math.inf)
        if self.showing.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1)

    def loss(self, step: int, images: int, loss: float, lr: float) -> None:
        self.log.add(step, images, loss)
        if self._board is not None:
            self._board.add_scalar("loss", loss, step)
            self._board.add_scalar("lr", lr, step)

    def flush(self) -> None:
        self.log.flush()
        if self.fd.rows:
            self.fd.flush()
        if self._board is not None:
            self._board.flush()

    def pictures(self, model: Model, images: int) -> None:
        """loss.png and a grid of samples."""
        plot(self.log, self.out / "loss.png")
        sample_grid(model, self.out / f"samples-{images:08d}.png")

    def measure(self, model: Model, step: int, images: int) -> Row:
        """A row of fd.csv; a new least distance makes best.safetensors."""
        assert self.showing.judge is not None
        if self._reference is None:
            few = slice(REFERENCE_IMAGES)
            labels = None if self.data.labels is None else self.data.labels[few].cpu()
            self._reference = Reference.of(self.data.images[few].cpu(), labels, self.showing.judge)
        row = evaluate(model, self._reference, self.showing.fd_nfe or usual_nfe(model), self.showing.fd_images)
        self.fd.add(step, images, row.fd, row.agreement, row.nfe)
        if row.fd < self.best:
            self.best = row.fd
            model.info["fd"] = {"fd": row.fd, "nfe": row.nfe, "n": row.n, "floor": row.floor, "images": images}
            model.save(self.out / "best.safetensors")
        if self._board is not None:
            self._board.add_scalar("fd", row.fd, step)
        return row

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

"""What a run shows while it goes on: the loss as CSV and curve, and grids of samples."""

import csv
from pathlib import Path

from fastdiff.model import Model, atomically


class LossLog:
    """Loss per step in <out>/loss.csv (step, images, loss), and its running mean."""

    def __init__(self, out: Path):
        self.path, self.picture = out / "loss.csv", out / "loss.png"
        self.rows: list[tuple[int, int, float]] = []
        self.smooth = float("nan")

    def add(self, step: int, images: int, loss: float) -> None:
        self.rows.append((step, images, loss))
        self.smooth = loss if self.smooth != self.smooth else 0.98 * self.smooth + 0.02 * loss

    def keep(self, step: int) -> None:
        """Read what an earlier start wrote and drop all that came after `step`."""
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [(int(r["step"]), int(r["images"]), float(r["loss"])) for r in csv.DictReader(file) if r["loss"]]
            for row in rows:
                if row[0] <= step:
                    self.add(*row)

    def flush(self) -> None:
        atomically(self.path, self._write)

    def _write(self, path: str) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "images", "loss"))
            writer.writerows(self.rows)

    def plot(self) -> None:
        """Draw the curve where matplotlib is installed (extra "train"); the CSV is there without it."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        window = max(len(self.rows) // 200, 1)
        chunks = [self.rows[i : i + window] for i in range(0, len(self.rows), window)]
        axes.plot([c[-1][1] for c in chunks], [sum(r[2] for r in c) / len(c) for c in chunks])
        axes.set(xlabel="training images", ylabel=f"loss, mean of {window} steps", yscale="log")
        axes.grid(alpha=0.3)
        figure.savefig(self.picture, dpi=120)


def sample_grid(model: Model, path: Path, n: int = 64) -> None:
    """A PNG of n samples at the model's usual number of evaluations, always from the same seeds."""
    from fastdiff.images import save_grid
    from fastdiff.sample import sample

    nfe = 2 if model.family == "consistency" else 17
    save_grid(sample(model, nfe, seeds=range(n), progress=False), path)

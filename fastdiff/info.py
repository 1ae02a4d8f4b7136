"""What runs where: versions, devices and the implementation that serves each op."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastdiff.cache import VARIABLE, folder
from fastdiff.model import ASSETS, load
from fastdiff.ops import conv3x3_algorithms, implementations, native
from fastdiff.version import __version__

PACKAGES = ("torch", "triton", "torchvision", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Installed versions of fastdiff, Python and what it stands on."""
    found = {"fastdiff": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def report(model: str | os.PathLike | None = None) -> str:
    """The text that `fastdiff info` prints; with `model`, also what that checkpoint holds."""
    lines = ["  ".join(f"{name} {version}" for name, version in versions().items()), ""]
    lines += [*_devices(), "", *_ops(), ""]
    if model is None:
        names = ", ".join(f"{p.stem} ({p.stat().st_size / 2**20:.1f} MB)" for p in sorted(ASSETS.glob("*.safetensors")))
        lines.append(f"packaged models: {names or 'none'}")
    else:
        lines += _model(model)
    return "\n".join(lines)


def info(model: str | os.PathLike | None = None) -> None:
    """Print versions, devices, which implementation serves each op and why, and what a checkpoint holds."""
    print(report(model))


def _devices() -> list[str]:
    lines = [f"cpu     {torch.get_num_threads()} threads, {native()}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}  {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        built = "torch is built for CUDA" if torch.version.cuda else "torch is built without CUDA"
        lines.append(f"cuda    none usable here ({built})")
    kept = folder()
    lines.append(f"cache   {kept}" if kept else f"cache   none ({VARIABLE} is off, or its folder cannot be made)")
    if os.environ.get("FASTDIFF_STRICT", "0") not in ("", "0"):
        lines.append("FASTDIFF_STRICT is set: an op without a kernel raises instead of running its plain-torch reference")
    return lines


def _ops() -> list[str]:
    rows: list[tuple[str, ...]] = [("op", "cpu", "cuda")]
    notes: list[str] = []
    for name, served in implementations().items():
        rows.append((name, *(served[device].name for device in ("cpu", "cuda"))))
        for device in ("cpu", "cuda"):
            why = served[device].why
            if why and f"{device}: {why}" not in notes:
                notes.append(f"{device}: {why}")
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        algorithms = {d: conv3x3_algorithms(d, device) for d in (torch.float32, torch.bfloat16)}
        by = "; ".join(f"{', '.join(names)} ({str(d)[6:]})" for d, names in algorithms.items())
        notes.append(f"{device}: conv3x3 by {by}")
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows] + notes


def _model(source: str | os.PathLike) -> list[str]:
    model = load(source)
    weights = sum(v.numel() for v in model.state.values())
    lines = [
        f"{Path(source).name}: {model.family} model, {weights:,} weights, hash {model.hash()}",
        f"images      {model.shape}, {f'{model.labels} classes' if model.labels else 'unconditional'}",
        f"schedule    {model.schedule}",
        f"prediction  {model.prediction}",
        f"times       {', '.join(f'nfe {k}: {v}' for k, v in model.times.items()) or 'none recorded'}",
    ]
    lines += [f"{key:<11} {value}" for key, value in model.info.items() if key != "training"]
    return lines

"""Checkpoints of a run: all of a file or nothing, the newest and a few older ones, and what is said when a disk is full."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastdiff.atomic import atomically, remove_leftovers

STATE = "state.pt"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How writers that hide the number say it: PyTorch's archive, safetensors' IoError.
SIGNS = ("No space left", "Disk quota", "File too large", "unexpected pos", "PytorchStreamWriter failed writing")


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step, the last good checkpoint and the likely cause."""


def is_full(error: BaseException) -> bool:
    """True for the ways in which writers say that a disk or quota is full."""
    number = getattr(error, "errno", None)
    return number in FULL or any(sign in str(error) for sign in SIGNS)


@contextlib.contextmanager
def room(out: Path, step: int) -> Iterator[None]:
    """Turn a full disk into an error that says what is whole and what to do."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(out).free
        raise TrainingError(
            f"step {step}: no room left to write in {out} ({free / 1e6:,.1f} MB free; {error}). {kept(out)}; free some "
            f"space, then: fastdiff resume {out}"
        ) from error


def kept(out: Path) -> str:
    """Which checkpoint a person can go back to."""
    state = out / STATE
    if not state.exists():
        return "No checkpoint was written yet"
    try:
        step = torch.load(state, map_location="meta", weights_only=True)["step"]
    except Exception:
        return f"{state} is the last checkpoint, but it cannot be read"
    return f"The last good checkpoint is {state}, of step {step}"


def save(out: Path, state: dict[str, Any], keep: int) -> None:
    """Write out/state.pt; before it is replaced, the old one gets a second name, and only `keep` in all stay."""
    path = out / STATE

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            torch.save(state, file)

    def put(temporary: str) -> None:
        write(temporary)
        if keep > 1 and path.exists():
            older = out / f"state-{_step_of(path):09d}.pt"
            older.unlink(missing_ok=True)
            os.link(path, older)

    atomically(path, put)
    for old in older_ones(out)[: -(keep - 1) or None]:
        old.unlink()


def older_ones(out: Path) -> list[Path]:
    """The kept checkpoints before the newest, oldest first."""
    return sorted(out.glob("state-*.pt"))


def _step_of(path: Path) -> int:
    return int(torch.load(path, map_location="meta", weights_only=True)["step"])


def read(out: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint; None where there is none. What a kill left half-written is removed.

    Raises: ValueError where the file is damaged, naming an older one that is there.
    """
    remove_leftovers(out)
    path = out / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        state["step"], state["config"], state["network"]
    except Exception as error:
        older = older_ones(out)
        remedy = f"copy {older[-1]} over it to go on from there" if older else "start again in another --out"
        raise ValueError(f"out: the checkpoint {path} is damaged ({str(error)[:120]}); {remedy}") from error
    return state


def enough_room(out: Path, bytes_needed: int) -> None:
    """Refuse, before the first step, a disk that the files of a run do not fit on."""
    free = shutil.disk_usage(out).free
    if free < bytes_needed:
        raise TrainingError(
            f"out: the disk of {out} has {free / 1e6:,.0f} MB free, checkpoints and models of this run take "
            f"{bytes_needed / 1e6:,.0f} MB; free some space or choose another --out"
        )

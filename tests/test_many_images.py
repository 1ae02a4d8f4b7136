"""`fastdiff sample --seeds ... --out DIR` by processes that share the work, are killed and stopped: the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdiff import cli
from fastdiff.atomic import atomically, remove_leftovers

N = 40


def command(checkpoint, out, ranks=1, nfe=2):
    python = [sys.executable, "-m"]
    run = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    asked = ["--nfe", str(nfe), "--sampler", "euler", "--seeds", f"0-{N - 1}", "--batch-size", "2", "--out", str(out)]
    return [*python, *run, "fastdiff", "sample", str(checkpoint), *asked]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """What one undisturbed process writes."""
    out = tmp_path_factory.mktemp("whole") / "images"
    subprocess.run(command(checkpoint, out), check=True, capture_output=True)
    assert len(files(out)) == N + 1
    return files(out)


def begin(arguments, **options):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(arguments, start_new_session=True, **quiet | options)


def wait_for(out, count, process, seconds=300):
    """Until so many images are there."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if out.is_dir() and len(list(out.glob("0*.png"))) >= count:
            return
        time.sleep(0.005)


def rank_of(process):
    """A worker of torchrun: the children of the launcher that run the command."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "fastdiff sample" in line.replace(" -m ", " ")]


@pytest.mark.slow  # test_killed_rank has two ranks complete the folder, too
@pytest.mark.parametrize("ranks", [2, 4])
def test_torchrun(ranks, checkpoint, whole, tmp_path):
    """Ranks talk to nobody: each takes its share of the batches, and the folder is one process's, byte for byte."""
    subprocess.run(command(checkpoint, tmp_path / "out", ranks), check=True, capture_output=True)
    assert files(tmp_path / "out") == whole


def killed_and_continued(checkpoint, whole, out, ranks, after):
    """kill -9 of one rank once `after` images are there, then the same command again."""
    process = begin(command(checkpoint, out, ranks))
    wait_for(out, after, process)
    victims = rank_of(process) or [process.pid]
    os.kill(random.Random(after).choice(victims), signal.SIGKILL)
    process.wait(120)
    begun = {name: data for name, data in files(out).items() if not name.endswith(".part")}
    assert all(data == whole[name] for name, data in begun.items())
    subprocess.run(command(checkpoint, out, ranks), check=True, capture_output=True)
    assert files(out) == whole
    return len(begun)


def test_killed_rank(checkpoint, whole, tmp_path):
    assert killed_and_continued(checkpoint, whole, tmp_path / "out", 2, 3) < N + 1


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_killed_ranks(attempt, checkpoint, whole, tmp_path):
    killed_and_continued(checkpoint, whole, tmp_path / "out", 2, random.Random(attempt).randrange(1, N - 4))


def test_leftovers(tmp_path, checkpoint, whole, monkeypatch):
    """A file half written by a process that is gone is removed; one of a living process, and files of others, stay."""
    out = tmp_path / "out"
    out.mkdir()
    half = f"""
import os, signal
from fastdiff.atomic import atomically
def write(path):
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
atomically({str(out / "000003.png")!r}, write)
"""
    subprocess.run([sys.executable, "-c", half])
    left = [path.name for path in out.iterdir()]
    assert len(left) == 1 and left[0].startswith(".000003.png.") and left[0].endswith(".part")
    (out / ".notes.part").write_text("mine")

    def look(path):
        assert remove_leftovers(out) == 1, "the other one's"
        Path(path).write_bytes(b"whole")

    atomically(out / "living", look)
    assert (out / "living").read_bytes() == b"whole" and not (out / left[0]).exists()
    subprocess.run([sys.executable, "-c", half])
    monkeypatch.setattr(sys, "argv", ["fastdiff", *command(checkpoint, out)[3:]])
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main()
    assert {k: v for k, v in files(out).items() if k not in ("living", ".notes.part")} == whole


def test_interrupted(checkpoint, whole, tmp_path):
    """Ctrl-C: status 130, one line, whole files only, no leftovers; the same command goes on."""
    out = tmp_path / "out"
    process = begin(command(checkpoint, out), stderr=subprocess.PIPE)
    wait_for(out, 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    begun = files(out)
    if process.returncode:  # it may have been done already
        assert process.returncode == 130 and "the same command goes on from here" in err.decode()
        assert b"Traceback" not in err
    assert all(data == whole[name] for name, data in begun.items())
    subprocess.run(command(checkpoint, out), check=True, capture_output=True)
    assert files(out) == whole

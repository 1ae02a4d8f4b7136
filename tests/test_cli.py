"""The `fastdiff` command as a person uses it: what it prints, writes and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny

import fastdiff
from fastdiff.images import read_metadata, save_image, to_uint8
from fastdiff.info import versions
from fastdiff.metrics import Classifier
from fastdiff.model import Model
from fastdiff.samplers import SAMPLERS
from fastdiff.training import PRESETS


def pixels(path):
    return np.asarray(Image.open(path))


def test_sample_writes_a_grid_that_can_be_repeated(fastdiff_command, checkpoint):
    status, out, _ = fastdiff_command("sample", checkpoint, "--nfe", 5, "--n", 6, "--out", "a.png")
    assert status == 0
    assert "nfe     5 counted" in out and "images/s" in out
    for op in ("philox_normal", "denoise_step", "group_norm_silu"):
        assert f"op      {op}: {fastdiff.ops.implementations()[op]['cpu'].name}" in out
    stored = read_metadata("a.png")
    assert len(stored["request"]["seeds"]) == 6
    assert stored["plan"]["nfe"] == 5 and stored["plan"]["sampler"] == "unipc"
    assert stored["model_hash"] == fastdiff.load(checkpoint).hash()
    assert stored["versions"]["torch"] == versions()["torch"]
    assert fastdiff_command("sample", "--like", "a.png", "--out", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert pixels("a.png").std() > 0


def test_like_warns_when_the_model_changed(fastdiff_command, checkpoint):
    fastdiff_command("sample", checkpoint, "--nfe", 1, "--seeds", "0-1", "--out", "a.png")
    other = fastdiff.load(checkpoint)
    other.network.conv_out.bias.data += 1
    other.save("other.safetensors")
    status, _, err = fastdiff_command("sample", "other.safetensors", "--like", "a.png", "--out", "b.png")
    assert status == 0 and "the images will differ" in err


def test_seeds_labels_and_options_reach_the_sampler(fastdiff_command, checkpoint):
    arguments = ("--nfe", 2, "--seeds", "7,3-4", "--labels", "1,2,3", "--sampler", "ddim", "--times", "80,1.5")
    assert fastdiff_command("sample", checkpoint, *arguments, "--out", "a.png")[0] == 0
    request = read_metadata("a.png")["request"]
    assert request["seeds"] == [7, 3, 4] and request["labels"] == [1, 2, 3] and request["times"] == [80, 1.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nfe", 0), "nfe: 0"),
        (("--nfe", 16, "--sampler", "heun"), "the nearest are 15 and 17"),
        (("--labels", "12"), "labels: 12 is out of range; this model has classes 0 ... 9"),
        (("--out", "nowhere/x.png"), "the folder nowhere does not exist"),
        (("--out", "x.jpg"), "does not end in .png"),
        (("--out", "."), "is a folder"),
        (("--seeds", "5-3"), "write the smaller seed first"),
        (("--seeds", "x"), "'x' is no seed or range"),
        (("--seeds", str(2**64)), "out of range"),
        (("--n", 0), "n: 0"),
        (("--n", 2, "--seeds", "1"), "leave one of them out"),
        (("--sampler", "foo"), "auto, rk45 or one of analytic-ddpm"),
        (("--times", "80,90", "--sampler", "ddim"), "outside EDM's range"),
        (("--dtype", "int8"), "use one of float32"),
        (("--sampler", "rk45", "--nfe", 3, "--n", 1), "rk45: a sample needs more than 3 evaluations; loosen rtol and atol"),
        (("--like", "absent.png"), "absent.png is no file"),
    ],
)
def test_bad_requests_say_what_to_do_and_write_nothing(fastdiff_command, checkpoint, tmp_path, arguments, words):
    status, out, err = fastdiff_command("sample", checkpoint, *arguments)
    assert status == 2 and words in err and out == ""
    assert "Traceback" not in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU, so asking for one is no mistake")
def test_cuda_asked_for_and_absent(fastdiff_command, checkpoint):
    status, _, err = fastdiff_command("sample", checkpoint, "--device", "cuda")
    assert status == 2 and "no usable CUDA GPU; use device='cpu'" in err


def test_foreign_and_damaged_checkpoints(fastdiff_command, checkpoint, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-100])
    assert "truncated" in fastdiff_command("sample", "cut.safetensors")[2]
    assert "no file" in fastdiff_command("sample", "absent.safetensors")[2]


def test_unwritable_output(fastdiff_command, checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(13, "Permission denied")

    # Root may write anywhere, so the refusal is made here rather than by chmod.
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    status, out, err = fastdiff_command("sample", checkpoint)
    assert status == 2 and "cannot write in" in err and out == ""


def test_info_shows_every_op_and_the_checkpoint(fastdiff_command, checkpoint):
    status, out, _ = fastdiff_command("info", checkpoint)
    assert status == 0
    for op, served in fastdiff.ops.implementations().items():
        assert any(line.split()[:1] == [op] and served["cpu"].name in line for line in out.splitlines())
    assert fastdiff.load(checkpoint).hash() in out and "10 classes" in out


def test_average_of_two_models_and_its_provenance(fastdiff_command, checkpoint):
    one, two = fastdiff.load(checkpoint), fastdiff.load(checkpoint)
    one.info, two.info = {"command": "a && b"}, {"command": "a && c"}
    two.network.conv_out.bias.data += 2
    one.save("one.safetensors")
    two.save("two.safetensors")
    assert fastdiff_command("average", "one.safetensors", "two.safetensors", "--out", "mean.safetensors")[0] == 0
    mean = fastdiff.load("mean.safetensors")
    torch.testing.assert_close(mean.network.conv_out.bias, one.network.conv_out.bias + 1, rtol=2**-22, atol=0)
    assert torch.equal(mean.network.conv_in.weight, one.network.conv_in.weight)
    assert mean.info["command"].startswith("a && b && c && fastdiff average one.safetensors")
    assert fastdiff_command("average", "mean.safetensors", "--dtype", "float16", "--out", "half.safetensors")[0] == 0
    assert fastdiff.load("half.safetensors").info["command"] == mean.info["command"]


def test_average_refuses_models_of_different_kinds(fastdiff_command, checkpoint):
    other = fastdiff.load(checkpoint)
    other.family = "consistency"
    other.save("other.safetensors")
    status, _, err = fastdiff_command("average", checkpoint, "other.safetensors", "--out", "x.safetensors")
    assert status == 2 and "their family differs" in err


def test_train_refuses_a_misspelt_preset_and_missing_data(fastdiff_command):
    assert "did you mean mnist-edm?" in fastdiff_command("train", "--preset", "mnist-emd", "--data", ".", "--out", "r")[2]
    assert "no images in" in fastdiff_command("train", "--preset", "mnist-edm", "--data", ".", "--out", "r")[2]
    assert "--init" in fastdiff_command("train", "--preset", "mnist-ect", "--data", ".", "--out", "r")[2]
    assert "images: -1" in fastdiff_command("train", "--preset", "mnist-edm", "--data", ".", "--out", "r", "--images", -1)[2]


def test_sampler_options(fastdiff_command, checkpoint):
    """--option passes what the sampler takes, is stored and repeated, and is refused like any other argument."""
    request = ("sample", checkpoint, "--nfe", 4, "--seeds", "0-3", "--sampler", "ddim", "--option", "eta=0.5")
    assert fastdiff_command(*request, "--option", "spacing=quadratic", "--option", "clip=true", "--out", "a.png")[0] == 0
    assert read_metadata("a.png")["request"]["options"] == {"eta": 0.5, "spacing": "quadratic", "clip": True}
    assert fastdiff_command("sample", "--like", "a.png", "--out", "b.png")[0] == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    for wrong, words in (
        ("eta", "'eta' is no option; write name=value"),
        ("zeta=1", "zeta: sampler 'ddim' has no such option"),
    ):
        status, _, err = fastdiff_command(*request, "--option", wrong, "--out", "c.png")
        assert status == 2 and words in err and not Path("c.png").exists()


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_folder_of_images(fastdiff_command, checkpoint):
    """A file for each seed, the image itself; the same command again writes what is missing and nothing else."""
    request = ("sample", checkpoint, "--nfe", 2, "--sampler", "euler", "--seeds", "0-6,1000000", "--batch-size", 3)
    status, out, _ = fastdiff_command(*request, "--out", "all")
    assert status == 0 and "all: 8 images written, 0 there already" in out
    whole = files("all")
    assert sorted(whole) == ["000000.png", *[f"00000{i}.png" for i in range(1, 7)], "1000000.png", "request.json"]
    expected = fastdiff.sample(checkpoint, 2, seeds=[5], sampler="euler")
    assert np.array_equal(pixels("all/000005.png"), to_uint8(expected)[0, :, :, 0])
    for name in ("000002.png", "000006.png"):
        Path("all", name).unlink()
    old = {name: Path("all", name).stat().st_mtime_ns for name in files("all")}
    assert "all: 2 images written, 6 there already" in fastdiff_command(*request, "--out", "all")[1]
    assert files("all") == whole and all(Path("all", name).stat().st_mtime_ns == t for name, t in old.items())
    more = (*request[:-3], "0-9", *request[-2:])
    assert "all: 3 images written, 7 there already" in fastdiff_command(*more, "--out", "all")[1]
    status, _, err = fastdiff_command(*request[:3], 1, *request[4:], "--out", "all")
    assert status == 2 and "all holds images of another request (nfe differ)" in err


def test_quality_and_compile(fastdiff_command, checkpoint):
    """They reach the request, the report and the PNG; --like repeats what computed the images, whatever "auto" says then."""
    request = ("sample", checkpoint, "--nfe", 2, "--seeds", "0-3")
    status, out, _ = fastdiff_command(*request, "--compile", "fast", "--out", "fast.png")
    assert status == 0 and "engine  fast\n" in out
    assert read_metadata("fast.png")["request"]["compile"] == "fast"
    assert "engine  fast\n" in fastdiff_command("sample", "--like", "fast.png", "--out", "again.png")[1]
    assert np.array_equal(pixels("fast.png"), pixels("again.png"))
    out = fastdiff_command(*request, "--quality", "high", "--out", "high.png")[1]
    assert "torch.bfloat16" in out and "engine  network: compiling takes some" in out
    stored = read_metadata("high.png")["request"]
    assert (stored["quality"], stored["compile"]) == ("high", "off")
    assert not np.array_equal(pixels("high.png"), pixels("fast.png"))
    for name, words in (("quality", "use one of lossless, high, fast"), ("compile", "use one of auto, off, fast, inductor")):
        status, _, err = fastdiff_command(*request, f"--{name}", "best", "--out", "bad.png")
        assert status == 2 and f"{name}: 'best' is not known; {words}" in err and not Path("bad.png").exists()
    assert fastdiff_command(*request, "--quality", "high", "--out", "folder")[0] == 0
    about = json.loads(Path("folder/request.json").read_text())
    assert (about["quality"], about["compile"]) == ("high", "off")
    err = fastdiff_command(*request, "--compile", "fast", "--out", "folder")[2]
    assert "folder holds images of another request (quality, compile differ)" in err


def test_folder_by_several_processes(fastdiff_command, checkpoint, monkeypatch):
    """Ranks write disjoint batches, together what one process writes, byte for byte."""
    request = ("sample", checkpoint, "--nfe", 2, "--seeds", "10-22", "--batch-size", 4)
    fastdiff_command(*request, "--out", "one")
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        out = fastdiff_command(*request, "--out", "three")[1]
        counts.append(int(re.search(r"(\d+) images? written", out)[1]))
    assert counts == [4, 5, 4] and files("three") == files("one")


def test_every_sampler_and_preset_is_named(fastdiff_command):
    assert "fastdiff samplers" in " ".join(fastdiff_command("sample", "--help")[1].split())
    lines = fastdiff_command("samplers")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["sampler", *sorted([*SAMPLERS, "rk45"])]
    assert all(SAMPLERS[line.split()[0]].paper in line for line in lines[1:] if not line.startswith("rk45"))
    text = "".join(fastdiff_command("train", "--help")[1].split())
    assert all(name in text for name in PRESETS)


def test_times_are_searched_and_stored(fastdiff_command, tmp_path):
    """The times with the least FD of those tried go into the checkpoint, which then samples there; others are refused."""
    torch.manual_seed(0)
    network = fastdiff.UNet(tiny())
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model = Model(network, fastdiff.schedules.EDM(), fastdiff.Prediction("edm"), "consistency", (1, 8, 8))
    model.save("few.safetensors")
    Path("data").mkdir()
    for k in range(12):
        save_image(torch.rand(1, 8, 8) * 2 - 1, Path("data", f"{k}.png"))
    Classifier((1, 8, 8), 4).save("judge.safetensors")
    request = ("times", "few.safetensors", "--data", "data", "--classifier", "judge.safetensors", "--n", 6, "--levels", 5)
    status, out, err = fastdiff_command(*request, "--nfe", 2, "--out", "better.safetensors")
    assert status == 0, err
    tried = {line.split("t = ")[1]: float(line.split()[1]) for line in out.splitlines() if line.startswith("FD")}
    best = out.splitlines()[-1].removeprefix("better.safetensors: 2 evaluations at t = ")
    assert len(tried) == 4 and tried[best] == min(tried.values())
    better = fastdiff.load("better.safetensors")
    assert (
        fastdiff.make_plan(better, 2).times
        == better.times[2]
        == pytest.approx([float(t) for t in best.split(", ")], rel=1e-3)
    )
    model.family = "diffusion"
    model.save("few.safetensors")
    status, _, err = fastdiff_command(*request, "--nfe", 2, "--out", "other.safetensors")
    assert status == 2 and "few.safetensors is a diffusion model" in err and not Path("other.safetensors").exists()

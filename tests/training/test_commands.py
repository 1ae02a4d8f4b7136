"""train, distill, resume, eval and train-classifier as a person uses them: what they write, what they refuse in time."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny

import fastdiff
from fastdiff.metrics import load_classifier
from fastdiff.model import Model
from fastdiff.training import Trainer

FEW = ("--images", 16, "--batch", 8, "--report-every", 0, "--no-bf16")


@pytest.fixture
def call(fastdiff_command):
    return fastdiff_command


@pytest.fixture
def refused(call, monkeypatch):
    """refused(*arguments) -> the one line that is said instead of a first step."""
    monkeypatch.setattr(Trainer, "_one_step", lambda self: pytest.fail("a step was made"))

    def run(*arguments):
        status, out, err = call(*arguments)
        assert status == 2 and not out and err.startswith("fastdiff: ") and err.count("\n") == 1, (status, out, err)
        return err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 grey 8 x 8 images in two classes."""
    root, rng = tmp_path_factory.mktemp("data") / "blobs", np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(150 * k)).save(root / name / f"{i}.png")
    return root


def checkpoint(path, schedule=None, prediction="edm", family="diffusion", **options):
    torch.manual_seed(0)
    network = fastdiff.UNet(tiny(**{"labels": 2, "dropout": 0.0} | options))
    for p in network.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    c = network.config
    Model(network, schedule or fastdiff.schedules.EDM(), fastdiff.Prediction(prediction), family,
          (c.in_channels, c.resolution, c.resolution), c.labels).save(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def test_distil_measure_and_resume(call, folder, teacher, tmp_path):
    """Both methods, with a second judge and perceptual features; eval counts evaluations; resume goes on from run.json."""
    status, out, err = call("train-classifier", "--data", folder, "--out", "judge.safetensors", "--epochs", 1)
    assert status == 0 and "accuracy" in out, err
    assert load_classifier("judge.safetensors").info["data"].startswith("blobs, 12 training images")
    for method, more in (
        ("ect", ()),
        ("cd", ("--perceptual", "classifier", "--perceptual-classifier", "judge.safetensors")),
    ):
        status, out, err = call(
            "distill", "--teacher", teacher, "--method", method, "--data", folder, "--out", method, *more, *FEW
        )
        assert status == 0 and f"wrote {method}/model.safetensors" in out, err
        model = fastdiff.load(f"{method}/model.safetensors")
        assert model.family == "consistency" and model.info["images"] == 16
    assert "classifier features: ResNet" in model.info["perceptual"]
    status, out, err = call(
        "eval", "ect/model.safetensors", teacher, "--data", folder, "--classifier", "judge.safetensors", "--nfe", "1,3",
        "--n", 8, "--out", "eval.json",
    )  # fmt: skip
    assert status == 0 and "FD is no FID" in out, err
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [(r["nfe"], r["n"], r["seeds"]) for r in rows] == [(k, 8, [0, 7]) for k in (1, 3, 1, 3)]
    assert all(r["fd"] > 0 and 0 <= r["agreement"] <= 1 and r["images_per_second"] > 0 for r in rows)


def test_train_resume_and_fd(call, folder, tmp_path, monkeypatch):
    """FD while training, the best model, TensorBoard; stopped, its data moved, resumed to the same bits."""
    judge, blobs = tmp_path / "judge.safetensors", tmp_path / "blobs"
    shutil.copytree(folder, blobs)
    call("train-classifier", "--data", blobs, "--out", judge, "--epochs", 1)
    monkeypatch.setitem(cli_presets(), "blobs-edm", tiny_preset())
    monkeypatch.setattr("fastdiff.training.report.Showing.fd_images", 6)
    tensorboard = pytest.importorskip("tensorboard")
    words = ("train", "--preset", "blobs-edm", *FEW, "--checkpoint-every", 8, "--fd-every", 8, "--classifier", judge,
             "--tensorboard", "--data")  # fmt: skip
    assert call(*words, blobs, "--out", "whole")[0] == 0
    step = Trainer._one_step

    def stop(self):
        due = step(self)
        self._asked = True
        return due

    monkeypatch.setattr(Trainer, "_one_step", stop)
    status, _, err = call(*words, blobs, "--out", "cut")
    assert status == 130 and "stopped at step 1" in err and "fastdiff resume cut" in err
    monkeypatch.setattr(Trainer, "_one_step", step)
    blobs.rename(tmp_path / "moved")
    status, _, err = call("resume", "cut")
    assert status == 2 and "does not exist" in err
    status, out, err = call("resume", "cut", "--data", "moved")
    assert status == 0 and "continuing at 8 of 16 images" in out, err
    for name in ("model", "best"):
        assert fastdiff.load(f"whole/{name}.safetensors").hash() == fastdiff.load(f"cut/{name}.safetensors").hash()
    assert (tmp_path / "whole" / "fd.csv").read_text() == (tmp_path / "cut" / "fd.csv").read_text()
    assert list((tmp_path / "cut" / "tensorboard").iterdir()) and tensorboard
    status, out, _ = call("resume", "cut", "--data", "moved")
    assert status == 0 and "wrote" in out  # finished: nothing is left to do, the model is written again


def cli_presets():
    from fastdiff.training.presets import PRESETS

    return PRESETS


def tiny_preset(**options):
    from fastdiff.training import TrainConfig

    network = tiny(**{"labels": 2, "dropout": 0.0} | options)
    return TrainConfig("edm", network, fastdiff.schedules.EDM(), fastdiff.Prediction("edm"), images=16, warmup=0)


def test_wrong_data(refused, folder, tmp_path, monkeypatch):
    """Missing, without labels, too small, of another size or other channels: said before the first step."""
    monkeypatch.setitem(cli_presets(), "blobs-edm", tiny_preset())
    monkeypatch.setitem(cli_presets(), "deep-edm", tiny_preset(multipliers=(1, 1, 1, 1)))
    train = ("train", "--preset", "blobs-edm", "--out", "run", "--data")
    assert "data: nowhere does not exist; give MNIST's four files" in refused(*train, "nowhere")
    assert "labels: the network takes 2 classes, the data has no labels" in (said := refused(*train, folder / "dark"))
    assert "--unconditional" in said
    (tmp_path / "small").mkdir()
    for name, size, mode in (("small/0.png", (4, 4), "L"), ("wide/0.png", (16, 16), "L"), ("rgb/0.png", (8, 8), "RGB")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, size).save(tmp_path / name)
    unconditional = (*train[:3], "--unconditional", *train[3:])
    assert "data: images of 4 x 4 pixels cannot be halved 3 times" in refused(
        "train", "--preset", "deep-edm", "--unconditional", "--out", "run", "--data", "small"
    )
    assert "data: its images are 1 x 16 x 16, the network is made for 1 x 8 x 8" in refused(*unconditional, "wide")
    assert "data: its images are 3 x 8 x 8" in refused(*unconditional, "rgb")
    assert not (tmp_path / "run" / "state.pt").exists()


def test_wrong_requests(refused, folder, teacher):
    train = ("train", "--data", folder, "--out", "run", "--preset")
    assert "preset: 'mnist-emd' is not known; did you mean mnist-edm?" in refused(*train, "mnist-emd")
    assert "init: mnist-ect starts from a trained mnist-edm model; give --init" in refused(*train, "mnist-ect")
    assert "teacher: mnist-cd-l2 distils a trained mnist-edm model; give --teacher" in refused(*train, "mnist-cd-l2")
    assert "options: the loss 'edm' has no option 'p_meen'; did you mean p_mean?" in refused(
        *train, "mnist-edm", "--option", "p_meen=1", "--image-size", 28, "--unconditional"
    )
    assert "images: -1 makes no training" in refused(*train, "mnist-edm", "--images", -1)
    assert "batch: 8 images cannot be shared" in refused(*train, "mnist-edm", "--batch", 8, "--accumulate", 3)
    assert "augment: the network is told" in refused(*train, "mnist-edm", "--augment", 0.1)
    assert "download: None" not in refused("train", "--data", "x", "--out", "run", "--preset", "cats64-edm")
    if not torch.cuda.is_available():
        assert "no usable CUDA GPU; use --device cpu" in refused(*train, "mnist-edm", "--device", "cuda")


def test_teacher_and_student_that_do_not_fit(refused, folder, teacher, tmp_path):
    distill = ("distill", "--data", folder, "--out", "run", "--method")
    assert "method: 'dc' is not known; use one of cd, ect" in refused(*distill, "dc", "--teacher", teacher)
    assert "teacher: it makes images (1, 8, 8), the student (1, 28, 28)" in refused(
        *distill, "cd", "--teacher", teacher, "--preset", "mnist-cd-l2"
    )
    other = checkpoint(tmp_path / "labels.safetensors", labels=0, resolution=28, channels=16)
    assert "teacher: it knows 0 classes, the student 10" in refused(
        *distill, "cd", "--teacher", other, "--preset", "mnist-cd-l2"
    )
    other = checkpoint(tmp_path / "cm.safetensors", family="consistency")
    assert "teacher: it is a consistency model; distillation needs a diffusion model" in refused(
        *distill, "cd", "--teacher", other
    )
    other = checkpoint(tmp_path / "ddpm.safetensors", schedule=fastdiff.schedules.DDPM(), prediction="eps")
    assert "easy consistency tuning goes on with the weights of an EDM, this one is 'eps' on DDPM" in refused(
        *distill, "ect", "--teacher", other
    )
    assert "preset: mnist-ect trains with the loss 'ect', not 'cd'" in refused(
        *distill, "cd", "--teacher", teacher, "--preset", "mnist-ect"
    )
    assert "classifier: none is packaged for images (1, 8, 8); make one with fastdiff train-classifier" in refused(
        *distill, "cd", "--teacher", teacher, "--perceptual", "classifier"
    )


def test_another_architecture(call, refused, folder, teacher, monkeypatch, tmp_path):
    """A run that was begun cannot go on with another network, whether by the same command or by an edited run.json."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli_presets(), "blobs-edm", tiny_preset())
    monkeypatch.setitem(cli_presets(), "blobs-wide", tiny_preset(channels=16))
    train = ("train", "--data", folder, "--out", "run", *FEW, "--preset")
    assert call(*train, "blobs-edm")[0] == 0
    status, _, err = call(*train, "blobs-wide")
    assert status == 2 and "holds a run with other settings (network.channels: 8 there, 16 now)" in err
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    values["config"]["network"]["channels"] = 16
    (tmp_path / "run" / "run.json").write_text(json.dumps(values))
    status, _, err = call("resume", "run")
    assert status == 2 and "network.channels: 8 there, 16 now" in err
    (tmp_path / "run" / "run.json").write_text("{")
    status, _, err = call("resume", "run")
    assert status == 2 and "run.json is damaged" in err
    status, _, err = call("resume", "elsewhere")
    assert status == 2 and "run: elsewhere holds no run.json; give the folder" in err


def test_eval_refuses(refused, folder, teacher):
    assert "nfe: '1,x' is no list of numbers of evaluations" in refused("eval", teacher, "--data", folder, "--nfe", "1,x")
    assert "classifier: none is packaged for images (1, 8, 8)" in refused("eval", teacher, "--data", folder)
    assert "classifier: none.safetensors is no file; make one with" in refused(
        "eval", teacher, "--data", folder, "--classifier", "none.safetensors"
    )
    assert "data: its images are (1, 8, 8), mnist-edm makes (1, 28, 28)" in refused("eval", "mnist-edm", "--data", folder)
    assert "out: the folder no does not exist" in refused("eval", teacher, "--data", folder, "--out", "no/eval.json")
    assert "data: it has no labels" in refused("train-classifier", "--data", folder / "dark", "--out", "c.safetensors")

"""`fastdiff convert`: any checkpoint in, one of ours out."""

import pytest
import torch
from typer.testing import CliRunner
from writers import diffusers_folder, edm_pickle, state_of

import fastdiff
from fastdiff.cli import app
from fastdiff.commands.convert_command import options

CLI = CliRunner()


def test_edm(case, tmp_path):
    edm_pickle(tmp_path / "n.pkl", case("edm_adm_cond"))
    result = CLI.invoke(app, ["convert", str(tmp_path / "n.pkl"), str(tmp_path / "n.safetensors")])
    model = fastdiff.load(tmp_path / "n.safetensors")
    assert result.exit_code == 0 and model.hash() in result.output and "10 classes" in result.output
    assert "prediction edm on EDM" in result.output and model.info["source"] == "n.pkl"
    assert model.hash() == case("edm_adm_cond").model().hash()


def test_options(case, tmp_path):
    torch.save(state_of(case("gd_unet_iddpm_style")), tmp_path / "m.pt")
    arguments = ["-o", "image_size=16", "-o", "num_heads=4", "-o", "use_new_attention_order=True"]
    result = CLI.invoke(app, ["convert", str(tmp_path / "m.pt"), str(tmp_path / "m.safetensors"), *arguments])
    assert result.exit_code == 0, result.output
    expected = case("gd_unet_iddpm_style").model(use_new_attention_order=True)
    assert fastdiff.load(tmp_path / "m.safetensors").hash() == expected.hash()


def test_half_precision(case, tmp_path):
    diffusers_folder(tmp_path / "m", case("diffusers_unet2d_ddpm"))
    result = CLI.invoke(app, ["convert", str(tmp_path / "m"), str(tmp_path / "h.safetensors"), "--dtype", "float16"])
    assert result.exit_code == 0
    half = fastdiff.load(tmp_path / "h.safetensors").state["conv_in.weight"]
    assert torch.equal(half, case("diffusers_unet2d_ddpm").weights["conv_in.weight"].half().float())


def test_option_values():
    assert options(["a=1", "b=(1, 2)", "c=True", "d=word", "e="]) == {"a": 1, "b": (1, 2), "c": True, "d": "word", "e": ""}
    for bad in ("a", "=3", "a b=3"):
        with pytest.raises(ValueError, match=f"option: '{bad}' is no NAME=VALUE"):
            options([bad])


def test_bad_dtype(tmp_path):
    result = CLI.invoke(app, ["convert", "mnist-ect", str(tmp_path / "x"), "--dtype", "int8"])
    assert isinstance(result.exception, ValueError) and "dtype: 'int8' is not supported" in str(result.exception)

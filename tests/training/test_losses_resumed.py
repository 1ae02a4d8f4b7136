"""Losses that remember: a run that is cut goes on with their memory, bit for bit."""

import dataclasses

import pytest
import torch

from fastdiff import Prediction, schedules
from fastdiff.training import Trainer


def trainer(config, data, out):
    return Trainer(config, data, out, checkpoint_every=0, report_every=0, progress=False)


@pytest.mark.parametrize("loss", ["ct", "iddpm"])
def test_cut_and_resumed(loss, toy_config, toy_data, tmp_path):
    """A target network and a history of losses: three pieces give the weights of one run, with dropout."""
    if loss == "ct":
        config = toy_config("ct", prediction=Prediction("consistency"), options={"mu0": 0.5})
    else:
        config = toy_config("ddpm", schedule=schedules.DDPM(T=2, beta_start=0.1, beta_end=0.5), images=256)
        config = dataclasses.replace(
            config,
            loss="iddpm",
            prediction=Prediction("eps", learned_variance=True),
            network=dataclasses.replace(config.network, out_channels=2),
            options={"importance": True},
        )
    whole = trainer(config, toy_data, tmp_path / "whole")
    whole.train()
    if loss == "iddpm":  # so few times that all have been seen ten times and count
        assert not torch.isnan(whole.loss.state_dict()["history"]).any()
    for until in (3, config.steps - 2, None):
        cut = trainer(config, toy_data, tmp_path / "cut")
        cut.train(until)
    for a, b in zip(whole.network.parameters(), cut.network.parameters(), strict=True):
        assert torch.equal(a, b)
    one, other = (t.loss.state_dict() for t in (whole, cut))
    for kept in ("target", "history"):
        assert (kept in one) == (kept in other) == (kept == ("target" if loss == "ct" else "history"))
    if loss == "ct":
        assert all(torch.equal(v, other["target"][k]) for k, v in one["target"].items())
        assert not all(torch.equal(v, whole.network.state_dict()[k]) for k, v in one["target"].items())
    else:
        assert torch.equal(one["history"], other["history"])

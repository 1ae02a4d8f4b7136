"""What tests of training share: a silent trainer, and a model's weights as one vector."""

import torch

from fastdiff.training import Trainer


def trainer(config, data, out, **rest):
    return Trainer(config, data, out, **({"checkpoint_every": 0, "report_every": 0, "progress": False} | rest))


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state.values()])

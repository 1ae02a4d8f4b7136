"""What tests of training share: a silent trainer, and a model's weights as one vector."""

import torch

from fastdiff.training import Trainer


def trainer(config, data, out, **rest):
    return Trainer(config, data, out, **({"checkpoint_every": 0, "report_every": 0, "progress": False} | rest))


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state.values()])


def toy_run(out, steps, options):
    """A run that a child process can make: every kind of state is in it (target network, two averages, RAdam, dropout).

    A checkpoint follows each step.
    """
    torch.set_num_threads(1)
    from tiny import tiny

    import fastdiff
    from fastdiff.training import ImageData, TrainConfig

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = ImageData(images, torch.arange(24) % 2)
    config = TrainConfig(
        "ct", tiny(dropout=0.2, labels=2), fastdiff.schedules.EDM(), fastdiff.Prediction("consistency"), images=8 * steps,
        batch=8, optimizer="radam", warmup=64, bf16=False, ema=(500, 50), flip=True, options={"s0": 2, "s1": 20},
    )  # fmt: skip
    Trainer(config, data, out, checkpoint_every=8, report_every=0, progress=False, **options).train()

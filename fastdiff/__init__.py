"""fastdiff: fused kernels that make diffusion models fast, and everything around them that makes it usable.

import fastdiff
images = fastdiff.sample(nfe=2, seeds=range(64))    # float32 [64, 1, 28, 28] in [-1, 1]
"""

from fastdiff import ops, samplers, schedules
from fastdiff.accelerate import accelerate, restore
from fastdiff.compile import Compiled, compile, store  # noqa: F401  (store reads compiled files)
from fastdiff.denoiser import Denoiser, Prediction
from fastdiff.info import info
from fastdiff.model import CheckpointError, Model, from_state_dict, load, to_diffusers, wrap
from fastdiff.plan import Plan
from fastdiff.request import Guide, make_plan
from fastdiff.sample import Samples, run, sample
from fastdiff.unet import UNet, UNetConfig
from fastdiff.version import __version__

__all__ = [
    "CheckpointError",
    "Compiled",
    "Denoiser",
    "Guide",
    "Model",
    "Plan",
    "Prediction",
    "Samples",
    "UNet",
    "UNetConfig",
    "__version__",
    "accelerate",
    "compile",
    "from_state_dict",
    "info",
    "load",
    "make_plan",
    "ops",
    "restore",
    "run",
    "sample",
    "samplers",
    "schedules",
    "to_diffusers",
    "wrap",
]

"""The ops: schema, reference and derivatives here; kernels in csrc/ (CPU, CUDA) and fastdiff.kernels (Triton).

The tensor's device picks the implementation through PyTorch's dispatcher. This is the only floor of the package that
says `torch.ops.fastdiff`.
"""

from fastdiff.ops import _register
from fastdiff.ops._serving import Served, implementations, native
from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.denoise_step import denoise_step
from fastdiff.ops.embedding import embedding, frequencies
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.langevin_step import langevin_step
from fastdiff.ops.philox_normal import Domain, philox_normal, seed_tensor
from fastdiff.ops.resample import resample, resample_pads
from fastdiff.ops.schedule_coefficients import schedule_coefficients

_register.load_native()
_register.load_triton()

__all__ = [
    "Domain",
    "Served",
    "add_noise",
    "denoise_step",
    "embedding",
    "frequencies",
    "group_norm_silu",
    "implementations",
    "langevin_step",
    "native",
    "philox_normal",
    "resample",
    "resample_pads",
    "schedule_coefficients",
    "seed_tensor",
]

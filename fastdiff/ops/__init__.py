"""The ops: schema, reference and derivatives here; kernels in csrc/ (CPU, CUDA) and fastdiff.kernels (Triton).

The tensor's device picks the implementation through PyTorch's dispatcher. This is the only floor of the package that
says `torch.ops.fastdiff`.
"""

from fastdiff.ops import _register
from fastdiff.ops._conv3x3_weights import Norm, conv3x3_algorithms, conv3x3_pack
from fastdiff.ops._register import overload
from fastdiff.ops._serving import Served, implementations, native, served
from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.conv1x1 import conv1x1, conv1x1_pack, conv1x1_serves
from fastdiff.ops.conv3x3 import conv3x3
from fastdiff.ops.conv3x3_weight_gradient import conv3x3_weight_gradient
from fastdiff.ops.denoise_step import denoise_step
from fastdiff.ops.embedding import embedding, frequencies
from fastdiff.ops.group_norm_attention import group_norm_attention
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.langevin_step import langevin_step
from fastdiff.ops.philox_normal import Domain, philox_normal, seed_tensor
from fastdiff.ops.resample import resample, resample_pads
from fastdiff.ops.schedule_coefficients import schedule_coefficients

# op with both a C++ and a Triton kernel for CUDA -> which one serves where both are there, and why.
ON_CUDA = {
    "add_noise": ("cuda", "unmeasured; launched from C++, which costs less than from Python"),
    "group_norm_silu": ("cuda", "unmeasured; reads x once also where a slice is larger than one program's tile"),
    "denoise_step": ("cuda", "unmeasured; launched from C++, which costs less than from Python"),
    "philox_normal": ("cuda", "unmeasured; launched from C++, which costs less than from Python"),
}

_register.load_native()
_register.load_triton(ON_CUDA)
_register.load_composed()

__all__ = [
    "ON_CUDA",
    "Domain",
    "Norm",
    "Served",
    "add_noise",
    "conv1x1",
    "conv1x1_pack",
    "conv1x1_serves",
    "conv3x3",
    "conv3x3_algorithms",
    "conv3x3_pack",
    "conv3x3_weight_gradient",
    "denoise_step",
    "embedding",
    "frequencies",
    "group_norm_attention",
    "group_norm_silu",
    "implementations",
    "langevin_step",
    "native",
    "overload",
    "philox_normal",
    "resample",
    "resample_pads",
    "schedule_coefficients",
    "seed_tensor",
    "served",
]

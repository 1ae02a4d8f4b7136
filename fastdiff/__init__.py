"""fastdiff: fused kernels that make diffusion models fast."""

__version__ = "0.1.0"

"""Triton kernels and their launchers, one file per op; installed as fastdiff.kernels.

A launcher has exactly the signature of its op's schema. `fastdiff.ops._register.load_triton` registers the launchers for
CUDA tensors without importing this package: Triton is imported at the first CUDA call.
"""

"""Triton's interpreter, asked for before anything else imports Triton: tests/conftest.py imports this first."""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "kernels"))  # for kernel_checks and edge_kernel: importlib mode adds no path
HAS_GPU = torch.cuda.is_available()
KERNELS = [p.stem for p in Path(__file__).parents[1].glob("kernels/triton/*.py") if p.stem != "__init__"]


def _round_as_hardware(numpy, interpreter):
    """The interpreter truncates float32 to bfloat16 and E4M3 (triton 3.6 to 3.9); the hardware rounds, as tests must."""
    truncating = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        given = torch.from_numpy(numpy.ascontiguousarray(data))
        if str(source) == "fp32" and str(target) == "bf16":
            return given.to(torch.bfloat16).view(torch.int16).numpy().view(numpy.uint16).reshape(data.shape)
        if str(source) == "fp32" and str(target) == "fp8e4nv":
            return given.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(data.shape)
        return truncating(data, source, target, rounding_mode)

    interpreter._convert_float = convert


def _multiply_narrow(numpy, interpreter):
    """The interpreter's tl.dot multiplies bits of bfloat16 as integers, and E4M3 in float16: here they are widened first."""
    integers = interpreter.InterpreterBuilder.create_dot

    def widened(t):
        if str(t.dtype.scalar) == "fp8e4nv":
            values = torch.from_numpy(numpy.ascontiguousarray(t.data)).view(torch.float8_e4m3fn).float().numpy()
            return interpreter.TensorHandle(values, interpreter.tl.float32)
        if str(t.dtype.scalar) != "bf16":
            return t
        values = (t.data.astype(numpy.uint32) << 16).view(numpy.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    def create_dot(self, a, b, d, *options):
        return integers(self, widened(a), widened(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _interpret():
    """Import Triton and the kernels with TRITON_INTERPRET=1, which is read when a kernel is decorated, then take it back."""
    if "triton" in sys.modules:
        import triton

        if type(triton.language.zeros_like).__name__ != "InterpretedFunction":
            raise RuntimeError(
                "Triton was imported before tests/conftest.py could ask for its interpreter: no kernel would be tested"
            )
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import numpy
        import triton.experimental.gluon  # else imported at the first launch, with the variable gone
        from triton.runtime import interpreter

        _round_as_hardware(numpy, interpreter)
        _multiply_narrow(numpy, interpreter)
        for name in (*(f"fastdiff.kernels.{name}" for name in KERNELS), "edge_kernel"):
            importlib.import_module(name)
    except ImportError as error:
        return str(error)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return None


WHY_NOT = None if HAS_GPU else _interpret()

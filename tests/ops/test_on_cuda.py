"""Which CUDA implementation serves an op: the table of fastdiff/ops/__init__.py, and what the registration makes of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import ops
from fastdiff.ops import _register

ROOT = Path(__file__).parents[2]


def test_the_table_has_every_op_with_two_implementations():
    both = {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")} & {p.stem for p in (ROOT / "kernels/triton").glob("*.py")}
    assert set(ops.ON_CUDA) == both & set(_register.names())
    for op, (implementation, why) in ops.ON_CUDA.items():
        assert implementation in ("cuda", "triton") and why, op


def test_what_serves_is_what_the_table_says():
    if _register.triton_error:
        pytest.skip(_register.triton_error)
    for op, (wanted, _) in ops.ON_CUDA.items():
        here = _register.on_cuda(op)
        assert "triton" in here
        assert _register.serving(op, "cuda") == (wanted if "cuda" in here else "triton")


# A stand-in for the extension's CUDA kernel, registered before Triton's; nothing is launched.
PROGRAM = """
import sys, torch
from fastdiff.ops import _register
calls = []
fragment = torch.library.Library("fastdiff", "FRAGMENT")
_register.define("probe", "(Tensor x) -> Tensor", lambda x: x, lambda x: x)
fragment.impl("probe", lambda x: calls.append("cuda") or x, "CUDA")
_register._lazily = lambda name: lambda x: calls.append("triton") or x
_register._choose("probe", sys.argv[1])
x = torch.empty(2)
torch.library.get_kernel("fastdiff::probe", "CUDA").call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), x)
if sys.argv[1] == "triton":
    _register._OVERRIDDEN["probe"](x)
print(*calls, _register.serving("probe", "cuda"))
"""


@pytest.mark.parametrize(("wanted", "calls"), [("cuda", "cuda cuda"), ("triton", "triton cuda triton")])
def test_the_other_implementation_stays_callable(wanted, calls):
    run = subprocess.run([sys.executable, "-c", PROGRAM, wanted], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == calls

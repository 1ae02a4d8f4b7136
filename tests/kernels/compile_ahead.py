"""Compile for GPUs that are not here exactly what the launchers launch: run as a program, write one JSON of facts.

The launchers run on CPU tensors with JITFunction.run replaced: it specialises the arguments as Triton would and compiles
for each architecture instead of launching. A program of its own, because the tests' process has the interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdiff.kernels.add_noise import add_noise
from fastdiff.kernels.denoise_step import denoise_step
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.group_norm_silu_backward import group_norm_silu_backward
from fastdiff.kernels.philox_normal import philox_normal

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LAST = torch.channels_last

facts = []
now = {"case": "", "architectures": ()}


def source(kernel, arguments):
    """ASTSource with the types, constants and divisibility that Triton derives from these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin):
    """Registers, stack and local memory per thread, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def record(self, *args, grid, warmup=False, **kwargs):
    """Stands in for JITFunction.run."""
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
    for architecture in now["architectures"]:
        made = triton.compile(source(self, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
        fact = {"case": now["case"], "kernel": self.__name__, "architecture": architecture, "options": options}
        facts.append(fact | resources(made.asm["cubin"]) | {"ptx": made.asm["ptx"], "ttir": str(made.asm["ttir"])})


def noise():
    seeds = torch.arange(2)
    for now["case"], dtype in (("contiguous float32", torch.float32), ("contiguous bfloat16", torch.bfloat16)):
        philox_normal(seeds, 0, 0, (3, 32, 32), dtype)
    for now["case"], form in (("contiguous", torch.contiguous_format), ("channels-last", LAST)):
        x = torch.empty(2, 32, 32, 32).contiguous(memory_format=form)
        add_noise(x, seeds, torch.zeros(2, 2, 2), 0, 2)
        history = torch.empty(2, 2, 32, 32, 32).permute(0, 1, 4, 2, 3) if form is LAST else torch.stack((x, x))
        codes, row = torch.zeros(3, 5, dtype=torch.int32), torch.tensor([0])
        denoise_step(x, x.bfloat16(), x.clone(), history, x.bfloat16(), seeds, torch.zeros(3, 14), codes, row)


def norm():
    # Slices on chip and streamed ones; 192 channels in 32 groups, six each, are the odd case that vectorises worst.
    for now["case"], size, form in (
        ("whole bfloat16", (2, 256, 16, 16), torch.contiguous_format),
        ("whole channels-last bfloat16", (2, 192, 16, 16), LAST),
        ("streamed channels-last bfloat16", (2, 192, 64, 64), LAST),
    ):
        n, c = size[:2]
        x = torch.empty(size, dtype=torch.bfloat16).contiguous(memory_format=form)
        w, nc = torch.empty(c), torch.empty(n, c)
        args = (x, w, w, 32, 1e-5, nc, nc, nc)
        group_norm_silu(*args, None, True)
        if now["case"] != "whole bfloat16":
            group_norm_silu_backward(x, *args, torch.empty(n, 32, 2), True)


def huge():
    """Tensors past 2^31 elements: only addresses, since an expanded tensor has no memory behind it."""
    now["case"] = "huge"
    torch.Tensor.new_empty = torch.empty_like = lambda self, size=None, **_: torch.empty(1).expand(size or self.shape)
    x = torch.empty(1).expand(3, 2**16, 2**10, 2**6)
    add_noise(x, torch.arange(3), torch.zeros(3, 2, 2), 0, 2)
    w = torch.empty(2**16)
    group_norm_silu(x, w, w, 2, 1e-5, None, None, None, None, True)


if __name__ == "__main__":
    JITFunction.run = record
    now["architectures"] = (80, 90, 100)
    noise()
    now["architectures"] = (90,)
    norm()
    huge()
    Path(sys.argv[1]).write_text(json.dumps(facts))

"""python tests/kernels/compile_ahead.py OUT [--every]: compile for GPUs that are not here exactly what the launchers launch.

Writes OUT, one JSON of facts: all cases for sm_90; the first of each kernel, or --every one, for its other architectures.
The launchers run on CPU tensors with JITFunction.run replaced: it specialises the arguments as Triton would and compiles
for each architecture instead of launching. A program of its own, because the tests' process has the interpreter.

The cases are in ahead/<op>.py, one file an op:

    ARCHITECTURES = (80, 90, 100)
    NOISE = True                                    its kernels make noise: no contraction, no approximation
    def cases(case):                                one launch per variant worth compiling
        case("contiguous float32"); launcher(*tensors)
    def huge(): launcher(*tensors)                  optional: past 2^31 elements; only addresses count
    NARROW = {"_kernel loads": "why"}               optional: "loads" or "stores" that need not be 128 bits wide, in every
                                                    case or, as "_kernel loads, case", in one
    STACK = {"_kernel": (bytes, "why")}             optional: most stack it may have, for spills or else; a case
                                                    after a comma, as in NARROW
"""

import argparse
import importlib.util
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from machine_code import examine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdiff.kernels.dependent import keywords

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "launch_pdl")
AHEAD = Path(__file__).with_name("ahead")

MAIN = 90

facts = []
readings = {}  # cubin -> the future of its machine_code: cases may end in the same one
pool = ThreadPoolExecutor(2)
now = {"op": "", "case": "", "noise": False, "architectures": (), "every": False}


def load(path):
    """The module of one file of cases."""
    spec = importlib.util.spec_from_file_location(f"ahead_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source(kernel, arguments):
    """ASTSource with the types, constants and divisibility that Triton derives from these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, bool):
            signature[parameter.name], divisible = "u1", False
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def machine_code(cubin):
    """Registers, stack, local memory per thread and the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        [made] = examine(file.name)
    return {key: made[key] for key in ("reg", "stack", "local", "sass")}


def record(self, *args, grid, warmup=False, **kwargs):
    """Stands in for JITFunction.run. The launchers see CPU tensors: what depends on the GPU is put in its place here."""
    given = {p.name: p.default for p in self.params if p.has_default}
    given |= dict(zip(self.arg_names, args, strict=False)) | kwargs
    seen = any((f["op"], f["kernel"]) == (now["op"], self.__name__) for f in facts)
    for architecture in now["architectures"]:
        if seen and architecture != MAIN and not now["every"]:
            continue
        arguments = given | (keywords(divmod(architecture, 10)) if "PDL" in kwargs else {})
        options = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
        made = triton.compile(source(self, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
        fact = {key: now[key] for key in ("op", "case", "noise")}
        fact |= {"kernel": self.__name__, "architecture": architecture, "options": options}
        fact |= {"threads": 32 * made.metadata.num_warps, "shared": made.metadata.shared, "pdl": made.metadata.launch_pdl}
        cubin = made.asm["cubin"]
        if cubin not in readings:
            readings[cubin] = pool.submit(machine_code, cubin)
        facts.append(fact | {"cubin": cubin, "ptx": made.asm["ptx"], "ttir": str(made.asm["ttir"])})


def addresses_only():
    """Results of more than 2^31 elements without memory behind them: an expanded tensor has one element."""

    def expanded(self, size=None, dtype=None, **_):
        return torch.empty(1, dtype=dtype or self.dtype).expand(size or self.shape)

    torch.Tensor.new_empty = torch.empty_like = expanded


def compile_all(modules):
    for op, module in modules.items():
        now.update(op=op, noise=module.NOISE, architectures=module.ARCHITECTURES)
        module.cases(lambda name: now.update(case=name))
    addresses_only()
    for op, module in modules.items():
        if hasattr(module, "huge"):
            now.update(op=op, noise=module.NOISE, architectures=(MAIN,), case="huge")
            module.huge()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", action="store_true", help="every case for every architecture")
    chosen = parser.parse_args()
    now["every"] = chosen.every
    JITFunction.run = record
    compile_all({path.stem: load(path) for path in sorted(AHEAD.glob("*.py"))})
    for fact in facts:
        fact |= readings[fact.pop("cubin")].result()
    chosen.out.write_text(json.dumps(facts))

"""python benchmarks/noise_bits.py: the noise's bits on the device against the CPU reference; exits with 1 where one differs.

Every implementation that is here: what the dispatcher serves and, on a GPU, Triton's launcher too; draws, types, odd sizes,
batch splits, the blocks with the largest radius, and the noise inside add_noise in every memory format.
"""

import argparse
import importlib
import json
import sys

import torch

from fastdiff.ops import Domain, _register, seed_tensor
from fastdiff.ops.philox_normal import normal_float32

SEEDS = (0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF)
LARGEST_RADII = ((62408197, 2), (155288883, 6), (190466559, 11))  # seed, block: tests/ops/test_philox_statistics.py
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(made, wanted):
    """How many values differ in any bit."""
    integer = INTEGERS[wanted.element_size()]
    return int((made.cpu().contiguous().view(integer) != wanted.contiguous().view(integer)).sum())


def implementations(op, device):
    """name -> callable with the op's own arguments."""
    found = {_register.serving(op, device): _register.overload(op)}
    if device == "cuda" and "triton" not in found and _register.triton_error is None:
        found["triton"] = getattr(importlib.import_module(f"{_register.KERNELS}.{op}"), op)
    return found


def philox_cases(size):
    """(what, seeds, draw, domain, shape, dtype)"""
    yield f"{size} values", SEEDS[:1], 7, Domain.STEP, (size,), torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((), (1,), (5,), (3, 37, 41), (8, 32, 32)):
            yield f"{str(dtype)[6:]} {shape}", SEEDS, 2**32 - 1, Domain.AUGMENT, shape, dtype
    for seed in SEEDS:
        yield f"alone, seed {seed:x}", (seed,), 2**31, Domain.INITIAL, (3, 37, 41), torch.float32
    for seed, block in LARGEST_RADII:
        yield f"largest radius, seed {seed}", (seed,), 0, Domain.INITIAL, (4 * block + 4,), torch.float32


def philox_normal(fn, device, size):
    for what, seeds, draw, domain, shape, dtype in philox_cases(size):
        wanted = normal_float32(seed_tensor(seeds), draw, int(domain), shape).to(dtype)
        made = fn(seed_tensor(seeds, device), draw, int(domain), list(shape), dtype)
        yield what, wanted.numel(), differing(made, wanted)


def add_noise(fn, device, size):
    """The form (0, 1): what comes out is the noise, plus 0 x0."""
    forms, shape = torch.tensor([[[0.0, 1.0]]], device=device).expand(len(SEEDS), 1, 2), (16, 24, 20)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = (normal_float32(seed_tensor(SEEDS), 9, int(Domain.TRAINING), shape) + 0.0).to(dtype)
        x = torch.zeros(len(SEEDS), *shape, dtype=dtype, device=device)
        views = {"contiguous": x, "channels_last": x.contiguous(memory_format=torch.channels_last)}
        views["rows apart"] = torch.cat((x, x), -1)[..., : shape[-1]]
        for form, x0 in views.items():
            made = fn(x0, seed_tensor(SEEDS, device), forms, 9, int(Domain.TRAINING))[0]
            yield f"{form} {str(dtype)[6:]}", wanted.numel(), differing(made, wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", type=int, default=2**22, help="values of the largest case")
    args = parser.parse_args()
    lines = []
    for op, cases in (("philox_normal", philox_normal), ("add_noise", add_noise)):
        for name, fn in implementations(op, args.device).items():
            for what, values, wrong in cases(fn, args.device, args.size):
                lines.append({"op": op, "by": name, "case": what, "values": values, "differing": wrong})
                print(json.dumps(lines[-1]), flush=True)
    wrong, values = sum(line["differing"] for line in lines), sum(line["values"] for line in lines)
    print(f"{wrong} of {values} values differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""conv3x3 with all that is fused into it (norm, SiLU, bias, statistics) against the same layer of others, weights cold.

A network's weights do not stay in cache from one evaluation to the next, so every call takes another copy of them. The rate
counts the operations of the direct convolution. `bmm` is PyTorch's product of the same transformed matrices, and nothing
else: the roof in practice. `ncnn` and `onednn` are the convolution and bias alone, `compile` is norm, SiLU and convolution.
"""

import itertools
import math
import tempfile
from pathlib import Path

import numpy
import pytest
import torch
from harness import DEVICE, with_full
from torch.nn import functional

from fastdiff import ops

CASES = [  # N, I, O, H = W, dtype: levels of the DDPM and EDM CIFAR-10 nets and of ADM's ImageNet-64
    (1, 256, 256, 32, torch.float32),
    (1, 128, 128, 32, torch.float32),
    (1, 256, 256, 16, torch.float32),
    (1, 512, 256, 16, torch.float32),
    (1, 256, 256, 8, torch.float32),
    (1, 256, 256, 4, torch.float32),
    (1, 512, 512, 8, torch.float32),
    (1, 192, 192, 64, torch.float32),
    (1, 384, 384, 32, torch.float32),
    (1, 576, 576, 16, torch.float32),
    (1, 768, 768, 8, torch.float32),
    (8, 256, 256, 32, torch.float32),
    (8, 256, 256, 8, torch.float32),
    (8, 256, 256, 4, torch.float32),
    (1, 256, 256, 32, torch.bfloat16),
    (1, 128, 128, 32, torch.bfloat16),
    (1, 256, 256, 16, torch.bfloat16),
    (1, 256, 256, 8, torch.bfloat16),
    (1, 256, 256, 4, torch.bfloat16),
    (1, 384, 384, 32, torch.bfloat16),
    (1, 768, 768, 8, torch.bfloat16),
    (8, 256, 256, 32, torch.bfloat16),
    (8, 256, 256, 8, torch.bfloat16),
]
USUAL = [CASES[0], CASES[2], CASES[4], CASES[14]]
BEYOND_CACHE = 64 * 2**20  # bytes of weights


def name_of(case) -> str:
    n, inputs, outputs, side, dtype = case
    return f"{n}x{inputs}->{outputs} {side}x{side} {str(dtype)[6:]}"


def cold(fn, *packed):
    """fn of one copy of the weights after the other."""
    copies = min(64, -(-BEYOND_CACHE // packed[0].nbytes)) - 1
    cycle = itertools.cycle([*packed, *(packed[0].clone() for _ in range(copies))])
    return lambda: fn(next(cycle))


def ours(algorithm, x, weight, bias, norm):
    def run(packed):
        return ops.conv3x3(x, weight, bias, norm=norm, stats_groups=32, packed=packed, algorithm=algorithm)[0]

    return cold(run, ops.conv3x3_pack(weight, algorithm))


def onednn(x, weight, bias):
    """oneDNN's direct convolution with weights in its own format."""
    pads = [1, 1], [1, 1], [1, 1]
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to(x.dtype).to_mkldnn(), *pads, 1, list(x.shape))
    bias = bias.to(x.dtype)
    return cold(lambda w: torch.ops.mkldnn._convolution_pointwise(x, w, bias, *pads, 1, "none", [], ""), packed)


def compiled(x, weight, bias, norm):
    from torch._inductor import config

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = torch.nn.GroupNorm(32, x.shape[1]), torch.nn.Conv2d(*weight.shape[1::-1], 3, padding=1)
            self.conv.weight.data, self.conv.bias.data = weight, bias

        def forward(self, x):
            return self.conv(functional.silu(self.norm(x)))

    layer = Layer().eval().to(x.dtype, memory_format=torch.channels_last).requires_grad_(False)
    with config.patch(freezing=True):
        run = torch.compile(layer)
        run(x)
    return lambda: run(x)


def ncnn(x, weight, bias):
    """ncnn's convolution, by Winograd's F(4, 3) where it so chooses."""
    import ncnn as library

    net = library.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = x.dtype == torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        outputs, count = weight.shape[0], weight.numel()
        layers = ["Input x 0 1 x", f"Convolution y 1 1 x y 0={outputs} 1=3 4=1 5=1 6={count}"]
        Path(folder, "param").write_text("\n".join(["7767517", "2 2", *layers, ""]))
        Path(folder, "bin").write_bytes(bytes(4) + weight.numpy().tobytes() + bias.numpy().tobytes())
        assert net.load_param(str(Path(folder, "param"))) == 0 and net.load_model(str(Path(folder, "bin"))) == 0
    pixels = numpy.ascontiguousarray(x[0].float().numpy())  # a Mat does not keep what it was made of
    image = library.Mat(pixels).clone()

    def run():
        extractor = net.create_extractor()
        extractor.input("x", image)
        return torch.from_numpy(numpy.array(extractor.extract("y")[1]))[None]

    return run


def products(x, weight, algorithm):
    """The algorithm's products by BLAS, which has none of 16-bit integers: bfloat16's take as long."""
    side, points = (2, 16) if algorithm == "winograd2" else (4, 36)
    tiles = x.shape[0] * math.ceil(x.shape[2] / side) ** 2
    v = torch.randn(points, tiles, x.shape[1]).to(x.dtype)
    u = torch.randn(points, x.shape[1], weight.shape[0]).to(x.dtype)
    return cold(lambda u: torch.bmm(v, u), u)


@pytest.mark.skipif(DEVICE != "cpu", reason="Winograd's algorithm has a CPU kernel alone")
@pytest.mark.parametrize("case", with_full(CASES, USUAL), ids=name_of)
@torch.inference_mode()
def test_conv3x3(compare, missing, case):
    n, inputs, outputs, side, dtype = case
    torch.manual_seed(0)
    x = torch.randn(n, inputs, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3).div((9 * inputs) ** 0.5).to(dtype).float()
    bias, norm = torch.randn(outputs).to(dtype).float(), ops.Norm(torch.ones(inputs), torch.zeros(inputs), 32)
    groups = x.double().reshape(n, 32, -1)
    known = torch.stack((groups.mean(-1), groups.var(-1, correction=0)), -1).float()  # a network's previous layer gives them
    served = ops.conv3x3_algorithms(dtype)
    algorithm = "winograd4_int16" if "winograd4_int16" in served else "winograd4"
    variants = {
        "fastdiff": ours(algorithm, x, weight, bias, norm._replace(stats=known)),
        "lean": ours("winograd4_lean", x, weight, bias, norm._replace(stats=known)),
        "direct": ours("direct", x, weight, bias, norm._replace(stats=known)),
        "onednn": onednn(x, weight, bias),
        "compile": compiled(x, weight, bias, norm),
        "bmm": products(x, weight, algorithm),
    }
    for other in {"winograd2", "winograd6"}.intersection(served):
        variants[other] = ours(other, x, weight, bias, norm._replace(stats=known))
    skipped = {"ncnn": "it takes one image"} if n > 1 else {"ncnn": missing("ncnn")} if missing("ncnn") else {}
    if not skipped:
        variants["ncnn"] = ncnn(x, weight, bias)

    def check():
        h = ops.group_norm_silu(x.double(), *norm[:8])
        exact = {True: functional.conv2d(h, weight.double(), bias.double(), padding=1)}
        exact[False] = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)

        def error(name):
            truth = exact[name not in ("onednn", "ncnn")]
            return float((variants[name]() - truth).norm() / truth.norm())

        errors = {name: error(name) for name in variants if name != "bmm"}
        print(name_of(case), {name: f"{e:.2e}" for name, e in errors.items()})
        assert all(e < 0.02 for e in errors.values()), errors
        assert errors["fastdiff"] <= (5e-6 if dtype == torch.float32 else 2 * errors["direct"]), errors

    compare("conv3x3", name_of(case), variants, check, flops=2 * 9 * x.numel() * outputs, skipped=skipped)


EIGHT_BITS = "fp8"
LARGE = [  # as CASES
    (64, 256, 256, 32, torch.bfloat16),
    (64, 256, 256, 16, torch.bfloat16),
    (512, 256, 256, 32, torch.bfloat16),
    (64, 192, 192, 64, torch.bfloat16),
    (64, 576, 384, 32, torch.bfloat16),
    (8, 256, 256, 32, torch.bfloat16),
]


@pytest.mark.skipif(
    EIGHT_BITS not in ops.conv3x3_algorithms(torch.bfloat16, DEVICE), reason="there is no GPU that multiplies E4M3"
)
@pytest.mark.parametrize("case", with_full(LARGE, LARGE[:2]), ids=name_of)
@torch.inference_mode()
def test_eight_bits(compare, case):
    """Beside the same layer in bfloat16, `direct`, and its convolution alone, `library`."""
    n, inputs, outputs, side, dtype = case
    x = torch.randn(n, inputs, side, side, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (
        torch.randn(outputs, inputs, 3, 3, device=DEVICE) / (9 * inputs) ** 0.5,
        torch.randn(outputs, device=DEVICE),
    )
    norm = ops.Norm(torch.ones(inputs, device=DEVICE), torch.zeros(inputs, device=DEVICE), 32)
    narrow = weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)

    def layer(algorithm):
        packed = ops.conv3x3_pack(weight, algorithm, norm=norm)
        packed = packed.to(dtype) if algorithm == "direct" else packed
        groups = 0 if algorithm == "direct" else 32  # behind the library the next norm takes its statistics itself
        given = {"norm": norm, "stats_groups": groups, "packed": packed, "algorithm": algorithm}
        return lambda: ops.conv3x3(x, weight, bias, **given)[0]

    variants = {"fastdiff": layer(EIGHT_BITS), "direct": layer("direct")}
    variants["library"] = lambda: functional.conv2d(x, *narrow, padding=1)

    def check():
        plain, got = variants["direct"]().float(), variants["fastdiff"]().float()
        error = float((got - plain).norm() / plain.norm())
        assert error < 0.045, error  # 0.036 of E4M3, and bfloat16's

    compare("conv3x3", f"{name_of(case)} {EIGHT_BITS}", variants, check, flops=2 * 9 * x.numel() * outputs)

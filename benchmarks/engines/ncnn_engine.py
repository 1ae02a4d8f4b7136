"""ncnn through pnnx: its Winograd convolutions are the best of the peers in float32. One image at a time, as ncnn does."""

import subprocess
import sys
from pathlib import Path

import torch

from engines.case import Case


def exported(case: Case):
    """The .param and .bin files that pnnx writes for one image."""
    one = Case(case.net, 1, case.folder)
    stem = case.folder / one.exported("pnnx").name.replace("-", "_")  # as pnnx names its files
    param, weights = stem.with_suffix(".ncnn.param"), stem.with_suffix(".ncnn.bin")
    if not (param.is_file() and weights.is_file()):
        import pnnx  # noqa: F401  (its tool is beside the interpreter)

        traced = torch.jit.trace(one.plain(), (one.x(), one.embeddings()[0]), check_trace=False)
        script = str(stem.with_suffix(".pt"))
        traced.save(script)
        shapes = f"inputshape={_shape(one.x())},{_shape(one.embeddings()[0])}"
        tool = Path(sys.executable).parent / "pnnx"
        with open(f"{stem}.log", "w") as log:
            subprocess.run([tool, script, shapes, "fp16=0"], cwd=case.folder, stdout=log, stderr=log, check=True)
    return param, weights


def _shape(t) -> str:
    return str(list(t.shape)).replace(" ", "") + "f32"


def prepare(case: Case, precision: str):
    import ncnn

    param, weights = exported(case)
    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = torch.get_num_threads(), False
    net.opt.use_winograd_convolution = net.opt.use_packing_layout = True
    net.opt.use_bf16_storage = net.opt.use_bf16_packed = precision == "bf16"
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise RuntimeError(f"ncnn cannot load {param}")
    embeddings = [e.numpy() for e in case.embeddings()]

    def one(x, e):
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(x).clone())
        extractor.input("in1", ncnn.Mat(e).clone())
        code, y = extractor.extract("out0")
        if code:
            raise RuntimeError(f"ncnn's extract gave {code}")
        return torch.from_numpy(y.numpy().copy())

    def forward(x, i):
        e = embeddings[i % len(embeddings)]
        return torch.stack([one(x[k].contiguous().numpy(), e[k]) for k in range(len(x))])

    return forward

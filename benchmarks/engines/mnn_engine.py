"""MNN, from ONNX by its converter; "low" precision is bfloat16 where the build has it."""

import subprocess
import sys
from pathlib import Path

import torch

from engines import Skipped
from engines.case import Case, onnx_file


def exported(case: Case) -> Path:
    path = case.exported("net.mnn")
    if not path.is_file():
        tool = Path(sys.executable).parent / "mnnconvert"
        command = [tool, "-f", "ONNX", "--modelFile", onnx_file(case), "--MNNModel", path, "--bizCode", "fastdiff"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return path


def prepare(case: Case, precision: str):
    import MNN

    level = {"fp32": "high", "bf16": "low"}[precision]
    settings = {"backend": "CPU", "numThread": torch.get_num_threads(), "precision": level, "memory": "normal"}
    runtime = MNN.nn.create_runtime_manager((settings,))
    net = MNN.nn.load_module_from_file(str(exported(case)), ["x", "e"], ["y"], runtime_manager=runtime)
    embeddings = [e.numpy() for e in case.embeddings()]

    def given(a):
        v = MNN.expr.placeholder(list(a.shape), MNN.expr.NCHW)
        v.write(a)
        return v

    def forward(x, i):
        y = net.forward([given(x.numpy()), given(embeddings[i % len(embeddings)])])
        y = MNN.expr.convert(y[0] if isinstance(y, list) else y, MNN.expr.NCHW)
        return torch.from_numpy(y.read().copy()).reshape(x.shape)

    if precision == "bf16":
        wide, low = prepare(case, "fp32")(case.x(), 0), forward(case.x(), 0)
        if (wide - low).norm() < 1e-5 * wide.norm():
            raise Skipped("this build of MNN computes in float32 at low precision too")
    return forward

"""One file per engine that computes a U-Net: what `compare.py` measures fastdiff against.

Each has prepare(case, precision) -> forward(x [B, C, H, W] float32, i) -> F float32, where i is the number of the
evaluation: the embedding of its time is computed beforehand for engines that get a plain network. An engine that is not
installed raises ImportError, one that cannot raises Skipped; both become rows that say so.
"""

ENGINES = {  # name -> module
    "fastdiff": "engines.fastdiff_engine",
    "torch-eager": "engines.torch_eager",
    "torch-compile": "engines.torch_compile",
    "openvino": "engines.openvino_engine",
    "ncnn": "engines.ncnn_engine",
    "mnn": "engines.mnn_engine",
    "onnxruntime": "engines.onnxruntime_engine",
    "physicsnemo": "engines.physicsnemo_engine",
}
PRECISIONS = {
    "fastdiff": ("fp32", "bf16"),
    "torch-eager": ("fp32", "bf16"),
    "torch-compile": ("fp32", "bf16"),
    "openvino": ("fp32", "bf16"),
    "ncnn": ("fp32", "bf16"),
    "mnn": ("fp32", "bf16"),
    "onnxruntime": ("fp32",),
    "physicsnemo": ("fp32", "bf16"),
}
NAMES = [f"{engine}-{precision}" for engine, precisions in PRECISIONS.items() for precision in precisions]


class Skipped(Exception):
    """Why an engine cannot compute this case."""

"""OpenVINO with fixed shapes, from ONNX."""

from engines.case import Case, onnx_file


def prepare(case: Case, precision: str, threads: int | None = None):
    import openvino
    import torch

    path = case.exported("openvino.xml")
    if not path.is_file():
        openvino.save_model(openvino.convert_model(str(onnx_file(case))), str(path), compress_to_fp16=False)
    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_HYPER_THREADING": True,
    }
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        from engines import Skipped

        raise Skipped("this processor has no bfloat16 that OpenVINO uses")
    request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    embeddings = [e.numpy() for e in case.embeddings()]

    def forward(x, i):
        result = request.infer([x.numpy(), embeddings[i % len(embeddings)]], share_inputs=True)
        return torch.from_numpy(next(iter(result.values())).copy())

    return forward

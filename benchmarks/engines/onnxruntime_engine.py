"""onnxruntime's CPU provider."""

import torch

from engines.case import Case, onnx_file


def prepare(case: Case, precision: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    session = onnxruntime.InferenceSession(str(onnx_file(case)), options, providers=["CPUExecutionProvider"])
    embeddings = [e.numpy() for e in case.embeddings()]

    def forward(x, i):
        return torch.from_numpy(session.run(None, {"x": x.numpy(), "e": embeddings[i % len(embeddings)]})[0])

    return forward

"""embedding against sines and cosines in PyTorch. Traffic: the result; a launch and its dispatch are what it costs."""

import pytest
import torch

from fastdiff import ops


@pytest.mark.parametrize("batch, count", [(64, 64), (64, 512), (4096, 64)])
def test_embedding(compare, device, batch, count):
    t, freqs = torch.rand(batch, device=device) * 1000, ops.frequencies(count, device=device)

    def plain(t, freqs):
        angle = torch.outer(t, freqs)
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    def check():
        truth = plain(t.double(), freqs.double())
        assert float((ops.embedding(t, freqs).double() - truth).abs().max()) < 2.4e-7  # as in tests/ops/test_embedding.py

    compiled = torch.compile(plain)
    variants = {
        "fastdiff": lambda: ops.embedding(t, freqs),
        "pytorch": lambda: plain(t, freqs),
        "compile": lambda: compiled(t, freqs),
    }
    compare("embedding", f"{batch} times, {count} frequencies", variants, check, moved=8 * batch * count)

"""embedding: positional and Fourier features."""

import math

import torch

from fastdiff.kernels.embedding import embedding

ARCHITECTURES = (80, 90, 100)
NOISE = False  # it uses the noise's sine and cosine, without its bits


def cases(case):
    t, freqs = torch.empty(8), torch.empty(64)
    case("positional float32")
    embedding(t, freqs, 1.0, True, torch.float32)
    case("fourier bfloat16")
    embedding(t, freqs, 2 * math.pi, True, torch.bfloat16)

"""conv3x3 by Winograd's algorithm of 16-bit integers: units that channels share, sums that must not overflow, NaN."""

import pytest
import torch
from torch.nn import functional
from winograd_error import matrices, tolerance

from fastdiff.ops import conv3x3, conv3x3_algorithms

INTEGERS = "winograd4_int16"
pytestmark = pytest.mark.skipif(INTEGERS not in conv3x3_algorithms(torch.bfloat16), reason="no AVX2, or no fastdiff._C")


@pytest.mark.parametrize("uneven", ["pixels", "filters", "both", "against each other", "a tile", "outputs"])
def test_integers_serve_channels_of_any_size(uneven):
    x, weight, size = torch.randn(1, 128, 16, 16), torch.randn(64, 128, 3, 3) / 34, torch.exp(1.5 * torch.randn(128))
    size[7] = 100.0
    if uneven in ("pixels", "both", "against each other"):
        x *= size[:, None, None]
    if uneven in ("filters", "both"):
        weight *= size[:, None, None]
    if uneven == "against each other":
        weight /= size[:, None, None]
    if uneven == "outputs":
        weight *= size[:64, None, None, None]
    if uneven == "a tile":
        x[..., 8:12, 8:12] *= 1e4
    x, weight = x.bfloat16(), weight.bfloat16()
    truth = functional.conv2d(x.double(), weight.double(), padding=1)
    y, _ = conv3x3(x, weight, algorithm=INTEGERS)
    plain = functional.conv2d(x, weight, padding=1)
    # of the image; far from the tile; one output
    for part in (..., (slice(None), slice(None), slice(0, 4)), (slice(None), 20)):
        assert (y - truth)[part].norm() < 2 * (plain - truth)[part].norm()  # the class of bfloat16


def test_integers_cannot_overflow():
    # One point of a tile is as large as it can be in all channels, with the signs of a filter's values there.
    _, g, bt = matrices(INTEGERS)
    for p, q, inputs in ((0, 0, 64), (1, 2, 128), (3, 3, 96), (5, 4, 7)):
        weight = torch.randn(32, inputs, 3, 3)
        sign = (g @ weight[3].double() @ g.T)[:, p, q].sign()
        tile = torch.linalg.inv(bt)[:, p, None] * torch.linalg.inv(bt)[:, q]
        x = torch.zeros(1, inputs, 12, 12, dtype=torch.float64)
        x[0, :, 3:9, 3:9] = sign[:, None, None] * tile  # what the tile in the middle reads
        x = x.bfloat16()
        truth = functional.conv2d(x.double(), weight.double(), padding=1)
        y, _ = conv3x3(x, weight, algorithm=INTEGERS)
        allowed = tolerance(INTEGERS, torch.bfloat16, x, weight, 1.0, truth.abs().max().item())
        assert (y - truth).abs().max() <= allowed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_tiles(value):
    x, weight = torch.randn(2, 70, 16, 16).bfloat16(), torch.randn(20, 70, 3, 3)
    clean, _ = conv3x3(x, weight, algorithm=INTEGERS)
    x[1, 69, 9, 5] = value  # of one tile, and of the margin of none
    y, _ = conv3x3(x, weight, algorithm=INTEGERS)
    assert y[1, :, 8:12, 4:8].isnan().all()
    y[1, :, 8:12, 4:8] = clean[1, :, 8:12, 4:8]
    assert torch.equal(y, clean)
    weight[5, 2, 1, 1] = value
    y, _ = conv3x3(x[:1], weight, algorithm=INTEGERS)
    assert y[:, 5].isnan().all() and y[:, :5].isfinite().all()


def test_integers_of_zeros_and_of_tiny_values():
    bias = torch.randn(24)
    for x, weight in (
        (torch.zeros(1, 8, 5, 5), torch.randn(24, 8, 3, 3)),
        (torch.randn(1, 8, 5, 5), torch.zeros(24, 8, 3, 3)),
    ):
        y, _ = conv3x3(x.bfloat16(), weight, bias, algorithm=INTEGERS)
        assert torch.equal(y, bias.bfloat16()[None, :, None, None].expand_as(y))
    x, weight = torch.randn(1, 8, 8, 8).bfloat16(), torch.randn(24, 8, 3, 3)
    y, _ = conv3x3(x, weight, algorithm=INTEGERS)
    small, _ = conv3x3(x * 2.0**-40, weight * 2.0**-30, algorithm=INTEGERS)
    assert torch.equal(small * 2.0**70, y)

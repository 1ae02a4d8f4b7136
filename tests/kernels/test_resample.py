"""The Triton resample against the float64 reference."""

import importlib

import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, check, lay

from fastdiff.ops.resample import reference

LINEAR = (1.0, 3.0, 3.0, 1.0)
# taps, up, down, p0, size of y from that of x: what the networks use; three phases, both ratios, more taps than are
# unrolled on either axis, crops, pads beyond the image.
FILTERS = (
    ((1.0, 1.0), 2, 1, 1, lambda n: 2 * n),
    ((1.0, 1.0), 1, 2, 0, lambda n: n // 2),
    (LINEAR, 2, 1, 2, lambda n: 2 * n),
    (LINEAR, 1, 2, 1, lambda n: n // 2),
    (LINEAR, 1, 1, 2, lambda n: n + 1),
    ((0.5, -1.0, 2.0), 3, 2, 4, lambda n: n + 2),
    (tuple(0.1 * k - 0.4 for k in range(13)), 2, 1, 5, lambda n: 2 * n),
    ((2.0, 1.0), 5, 3, -4, lambda n: n),
    (LINEAR, 1, 1, 9, lambda n: n + 12),
)
# Odd sides and channels; more than one tile over channels and pixels; one pixel.
SHAPES = ((2, 6, 5, 7), (1, 70, 9, 8), (1, 1, 40, 33), (2, 3, 1, 1))


@pytest.fixture
def launch(device):
    return importlib.import_module("fastdiff.kernels.resample").resample


def arguments(shape, taps, up, down, p0, size, dtype=torch.float32, layout="contiguous"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lay(x, layout), torch.tensor(taps), up, down, p0, size(shape[2]), size(shape[3])


def grid():
    """Every filter in every layout: on two of the shapes, which alternate, and in the slow tests on the other two."""
    for i, filter in enumerate(FILTERS):
        name = f"{len(filter[0])} taps, {filter[1]} up, {filter[2]} down, {filter[3]}"
        for j, layout in enumerate(LAYOUTS):
            for k, marks in enumerate(((), pytest.mark.slow)):
                shapes = SHAPES[(i + j + k) % 2 :: 2]
                yield pytest.param(filter, layout, shapes, marks=marks, id=f"{name}-{layout}-{shapes}")


@pytest.mark.parametrize(("filter", "layout", "shapes"), list(grid()))
def test_values(launch, device, filter, layout, shapes):
    for shape in shapes:
        i = SHAPES.index(shape)
        dtype = DTYPES[(i + len(layout)) % 3]
        x, taps, *rest = arguments(shape, *filter, dtype, layout)
        y = launch(x.to(device), taps.to(device), *rest).cpu()
        plain, truth = reference(x, taps, *rest), reference(x.double(), taps.double(), *rest)
        check(f"{shape} {dtype}", y, plain, truth, len(taps) ** 2)
        assert y.stride() == plain.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(launch, device, dtype):
    for layout in LAYOUTS:
        x, taps, *rest = arguments((2, 6, 8, 8), *FILTERS[2], dtype, layout)
        y = launch(x.to(device), taps.to(device, torch.bfloat16), *rest).cpu()
        check(layout, y, reference(x, taps, *rest), reference(x.double(), taps.double(), *rest), 16)


def test_views(launch, device):
    x, taps, *rest = arguments((4, 12, 10, 14), *FILTERS[3])
    for view in (x[:, 2:7], x[:, :, ::2, 1::3], x.transpose(2, 3), x.permute(0, 3, 1, 2), x[:1].expand(3, -1, -1, -1)):
        y = launch(view.to(device), taps.to(device), *rest).cpu()
        check(str(view.stride()), y, reference(view, taps, *rest), reference(view.double(), taps.double(), *rest), 16)


def test_wide_numbers(launch, device):
    """Positions past 2^31, where numbers of pixels are 64 bits wide: the last pixel of x, under a pad of 3 x 2^30."""
    x, taps = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4), torch.tensor([2.0])
    y = launch(x.to(device), taps.to(device), 2**16, 2**15, -(2**17), 3, 5).cpu()
    assert torch.equal(y, reference(x, taps, 2**16, 2**15, -(2**17), 3, 5)) and y[0, 0, 0, 0] == 4 * 11
    far = -(2**16) * 3 * 2**15
    assert (launch(x.to(device), taps.to(device), 2**16, 2**15, far, 3, 5) == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty(launch, device, shape):
    x, taps, *rest = arguments(shape, *FILTERS[4])
    y = launch(x.to(device), taps.to(device), *rest)
    assert y.shape == (*shape[:2], *rest[-2:]) and (y == 0).all()


def test_not_a_number_stays_where_its_taps_are(launch, device):
    x, taps, *rest = arguments((1, 4, 8, 8), *FILTERS[2])
    x[0, 1, 3, 2] = float("nan")
    y = launch(x.to(device), taps.to(device), *rest).isnan()
    assert y.sum() == 16 and y[0, 1, 5:9, 3:7].all()

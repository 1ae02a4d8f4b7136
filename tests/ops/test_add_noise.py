"""add_noise: values, noise bits, derivatives, layouts, sizes, errors."""

import sys

import pytest
import torch

from fastdiff.ops import Domain, add_noise, philox_normal, seed_tensor

module = sys.modules["fastdiff.ops.add_noise"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Whole vectors, odd sides whose samples are no whole number of blocks, one channel, many, no image, a vector, nothing.
SHAPES = [
    (2, 3, 32, 32),
    (3, 3, 7, 5),
    (2, 1, 9, 9),
    (1, 130, 6, 7),
    (4, 10),
    (5,),
    (2, 3, 0, 4),
    (0, 3, 4, 4),
    (1, 2, 3, 4, 5),
]


def inputs(shape, dtype=torch.float32, k=2, channels_last=False):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(shape, generator=generator).to(dtype)
    if channels_last and len(shape) == 4:
        x0 = x0.to(memory_format=torch.channels_last)
    coefficients = torch.randn(shape[0], k, 2, generator=generator)
    return x0, seed_tensor(range(10, 10 + shape[0])), coefficients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values(isa, dtype, channels_last, accurate):
    for shape in SHAPES:
        for k in (1, 3, 0):
            x0, seeds, c = inputs(shape, dtype, k, channels_last)
            got = torch.ops.fastdiff.add_noise(x0, seeds, c, 4, Domain.TRAINING)
            assert got.is_contiguous()
            plain, truth = (module.reference(x, seeds, c, 4, Domain.TRAINING) for x in (x0, x0.double()))
            accurate(got, plain, truth)


@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_bits(isa, channels_last):
    x0, seeds, c = inputs((3, 3, 13, 11), channels_last=channels_last)
    c[..., 0], c[..., 1] = 0, 1
    noise = philox_normal(seeds, 9, (3, 13, 11), domain=Domain.TRAINING)
    assert torch.equal(add_noise(x0, seeds, c, 9)[0], noise)


def test_views(isa, accurate):
    x0, seeds, c = inputs((4, 6, 10, 12))
    for view in (
        x0[:, 1:4],
        x0[:, :, ::2, 1::3],
        x0.transpose(2, 3),
        x0[:, ::2],
        x0.permute(0, 2, 3, 1),
        x0[:1].expand(4, -1, -1, -1),
    ):
        args = (seeds, c, 0, 2)
        truth = module.reference(view.double(), *args)
        accurate(torch.ops.fastdiff.add_noise(view, *args), module.reference(view, *args), truth)


def test_a_pair_shares_its_noise():
    x0, seeds, c = inputs((2, 3, 8, 8))
    c[:, 0], c[:, 1] = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 2.0])
    near, far = add_noise(x0, seeds, c, draw=1)
    torch.testing.assert_close(far - x0, 4 * (near - x0), rtol=1e-5, atol=1e-5)


def test_gradients():
    x0, seeds, c = inputs((2, 3, 3, 3), torch.float64)
    x0.requires_grad_()
    c = c.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, k: add_noise(x, seeds, k, 3), (x0, c), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functorch_agrees(dtype):
    x0, seeds, c = inputs((2, 3, 4, 4), dtype)
    tangent = torch.randn_like(x0)
    _, got = torch.func.jvp(lambda x: add_noise(x, seeds, c), (x0,), (tangent,))
    expected = c[:, :, 0].t().reshape(2, 2, 1, 1, 1) * tangent
    torch.testing.assert_close(got, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(dtype, channels_last):
    x0, seeds, c = inputs((2, 3, 4, 5), dtype, channels_last=channels_last)
    grad = dtype in (torch.float32, torch.float64)
    torch.library.opcheck(torch.ops.fastdiff.add_noise.default, (x0.requires_grad_(grad), seeds, c, 1, 2))


def test_compiles_as_one_graph():
    x0, seeds, c = inputs((2, 3, 8, 8))
    x0.requires_grad_()

    def loss(x):
        return add_noise(x, seeds, c, 1).square().sum()

    eager, compiled = loss(x0), torch.compile(loss, fullgraph=True)(x0)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, x0), torch.autograd.grad(eager, x0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, "x0: expected a floating-point"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds: expected int64 \[2\]"),
        ({"seeds": torch.zeros(2)}, "seeds: expected int64"),
        ({"coefficients": torch.zeros(2, 2)}, "coefficients: expected"),
        ({"coefficients": torch.zeros(2, 1, 2, dtype=torch.int64)}, "coefficients: expected a floating-point"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(zip(("x0", "seeds", "coefficients"), inputs((2, 3)), strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=message):
        add_noise(**arguments)

"""resample: separable FIR resampling of images, the op that doubles and halves resolution in NCSN++, DDPM++ and EDM.

Per axis, with the 1-D filter taps[0 ... T - 1] (gain included) and z the signal with up - 1 zeros after each element:

    z[up i] = x[i], 0 elsewhere
    y[o] = sum_k taps[k] z[down o + T - 1 - k - p0],    0 <= o < floor((up L + p0 + p1 - T) / down) + 1

that is: pad z by p0 before and p1 after (negative: crop), convolve where the filter fits, keep every down-th value. Both
axes (H and W) use the same filter. Sums are float32 (float64 for float64).
"""

import torch
from torch.autograd import forward_ad

from fastdiff.ops import _register
from fastdiff.ops._layout import image

LIMIT = 2**16  # of up, down and the number of taps; keeps index arithmetic far from 2^63


def _axis(x, taps, up, down, p0, size, dim):
    length, count = x.shape[dim], taps.shape[0]
    zero = x.new_zeros([1 if d == dim else s for d, s in enumerate(x.shape)])
    x = torch.cat((x, zero), dim)  # x[length]: what lies between and outside
    o = torch.arange(size, device=x.device)
    y = x.new_zeros([size if d == dim else s for d, s in enumerate(x.shape)])
    for k in range(count):
        j = down * o + count - 1 - k - p0
        i = torch.where((j % up == 0) & (j >= 0) & (j < up * length), j // up, length)
        y = y + taps[k] * x.index_select(dim, i)
    return y


def reference(x, taps, up, down, p0, height, width):
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    v, taps = x.to(working), taps.to(working)
    v = _axis(v, taps, up, down, p0, height, 2)
    return image(x, x.shape[1], height, width).copy_(_axis(v, taps, up, down, p0, width, 3))


def _fake(x, taps, up, down, p0, height, width):
    return image(x, x.shape[1], height, width)


# The sizes of the result stand for p1, which is another one on each axis of the derivative.
_register.define(
    "resample",
    "(Tensor x, Tensor taps, int up, int down, SymInt p0, SymInt height, SymInt width) -> Tensor",
    reference,
    _fake,
)


def _save(args, out):
    x, taps, up, down, p0, height, width = args
    rest = {"up": up, "down": down, "p0": p0, "in": x.shape[2:], "out": (height, width), "outputs": 1}
    return (taps,), rest


def _backward(tensors, rest, needs, dy):
    """dx[i] = sum_o dy[o] taps[down o + T - 1 - p0 - up i]: up and down swapped, the filter reversed, p0 -> T - 1 - p0."""
    (taps,) = tensors
    if needs[1]:
        raise RuntimeError("taps: no gradient of the filter is defined; pass taps.detach()")
    p0 = taps.shape[0] - 1 - rest["p0"]
    dx = _call(dy, taps.flip(0), rest["down"], rest["up"], p0, *rest["in"]) if needs[0] else None
    return dx, None, None, None, None, None, None


def _jvp(tensors, rest, dx, *_):
    return _call(dx, *tensors, rest["up"], rest["down"], rest["p0"], *rest["out"])


_call = _register.differentiable("resample", _save, _backward, _jvp)


def resample(
    x: torch.Tensor,  # [N, C, H, W]
    taps: torch.Tensor,  # [T]
    up: int = 1,
    down: int = 1,
    pad: tuple[int, int] = (0, 0),
) -> torch.Tensor:  # [N, C, H', W'], L' = floor((up L + p0 + p1 - T) / down) + 1
    """Zero insertion, padding, convolution with `taps` along H and W, decimation; formula: the module's docstring.

    The "upfirdn2d" of StyleGAN and NCSN++ with a separable filter. Doubling is `up=2` with taps of sum 2, halving `down=2`
    with taps of sum 1, both with `resample_pads`:

        taps [1, 1]:        nearest neighbour when doubling, 2 x 2 means when halving (DDPM++, EDM, ADM)
        taps [1, 3, 3, 1]:  linear interpolation of pixel centres and its adjoint (NCSN++)

    Args:
        x: [N, C, H, W] float32, bfloat16, float16 or float64; any strides. The result is channels-last where x is.
        taps: [T], any floating dtype, on x's device, T >= 1, gain included. A true convolution: reversed against torch's
            conv2d, which only an asymmetric filter tells. Not differentiated: an error where it requires grad.
        up, down: 1 ... 65536.
        pad: (p0, p1), elements before and after, counted after the zeros are inserted; negative ones crop.

    Returns: [N, C, H', W'] in x's dtype. Differentiable in x, forward and reverse, any number of times: the gradient is
    the op itself with up and down swapped and the filter reversed.

    Raises: TypeError, ValueError naming argument, value and remedy; among them a result without pixels of an x with some.

    Bytes moved: x read once, y written once.
    References: Karras 2020 (StyleGAN2, upfirdn2d); Song 2021 (NCSN++); Karras 2022 (resample_filter).
    """
    _check(x, taps, up, down, pad)
    height, width = (_size(length, taps.shape[0], up, down, pad) for length in x.shape[2:])
    return _call(x, taps, up, down, pad[0], height, width)


def resample_pads(count: int, up: int = 1, down: int = 1, kernel: int = 1) -> tuple[int, int]:
    """`pad` with which `count` taps change sizes by up / down exactly, placed as NCSN++, DDPM++ and EDM place them.

    With s = T - up when multiplying and T - down when dividing (sizes that `down` divides): ((s + 1) // 2 + up - 1, s // 2).
    [1, 1] gives (1, 0) for up=2 and (0, 0) for down=2; [1, 3, 3, 1] gives (2, 1) and (1, 1).

    kernel: the size k of an unpadded convolution that follows (the fused resampling of EDM and NCSN++); s grows by k - 1. A
    convolution that decimates by itself counts here, not in `resample`: [1, 3, 3, 1] before a 3 x 3 convolution of stride 2
    is `resample(x, taps, pad=resample_pads(4, down=2, kernel=3))` with pads (2, 2).
    """
    _whole("count", count), _whole("up", up), _whole("down", down), _whole("kernel", kernel)
    if up > 1 and down > 1:
        raise ValueError(f"up, down: {up} and {down} are both more than 1, for which there is no convention; give the pads")
    spare = count - max(up, down) + kernel - 1
    return (spare + 1) // 2 + up - 1, spare // 2


def _size(length, count, up, down, pad):
    size = (up * length + pad[0] + pad[1] - count) // down + 1
    if size >= 1:
        return size
    if length == 0:
        return 0
    raise ValueError(
        f"pad: {tuple(pad)} leaves no pixel of a side of {length} with up {up}, down {down} and {count} taps; "
        f"p0 + p1 >= {count - up * length} does"
    )


def _whole(name, value):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if not 1 <= value <= LIMIT:
        raise ValueError(f"{name}: {value} is not in 1 ... {LIMIT}")


def _check(x, taps, up, down, pad):
    if x.dim() != 4 or not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor [N, C, H, W], got {x.dtype} of shape {tuple(x.shape)}")
    if not isinstance(taps, torch.Tensor) or taps.dim() != 1 or not taps.is_floating_point():
        got = f"{taps.dtype} of shape {tuple(taps.shape)}" if isinstance(taps, torch.Tensor) else type(taps).__name__
        raise TypeError(f"taps: expected a floating-point tensor [T], got {got}; torch.tensor([0.5, 0.5]) is one")
    if not 1 <= taps.shape[0] <= LIMIT:
        raise ValueError(f"taps: {taps.shape[0]} taps; give 1 ... {LIMIT}")
    if taps.device != x.device:
        raise ValueError(f"taps: is on {taps.device}, x on {x.device}; move it to {x.device}")
    if (taps.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(taps).tangent is not None:
        raise ValueError("taps: requires grad or has a tangent, but its derivative is not defined; pass taps.detach()")
    _whole("up", up), _whole("down", down)
    if len(pad) != 2 or not all(isinstance(p, int | torch.SymInt) for p in pad):
        raise TypeError(f"pad: expected two whole numbers (before, after), got {pad!r}")
    if max(map(abs, pad)) > 2**31:
        raise ValueError(f"pad: {tuple(pad)} is beyond 2^31; use less")

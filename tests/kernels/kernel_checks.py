"""What the kernel tests share: layouts and the one tolerance."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "view")


def lay(t, layout):
    """t [..., C, H, W] with the same values in another layout; "view" has rows apart: no single stride over its pixels."""
    if layout == "channels_last":
        return t.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "view":
        return torch.cat((t, t), -1)[..., : t.shape[-1]]
    return t.contiguous()


def error(a, truth):
    return (a.double() - truth).abs().max().item() if truth.numel() else 0.0


def check(name, ours, plain, truth, sums=1, more=0.0):
    """Error against the float64 truth at most twice plain PyTorch's, plus a rounding floor.

    The floor is half a unit of the output's type at the truth's largest value, and the float32 noise of a sum of `sums`
    terms, which grows with the square root of their number: small cases where plain PyTorch happens to be exact need it.
    `more` is added to it where the problem magnifies the rounding of its input.
    """
    assert ours.shape == plain.shape and ours.dtype == plain.dtype, name
    assert not ours.isnan().any(), f"{name}: an element was not written"
    scale = truth.abs().max().item() if truth.numel() else 0.0
    floor = scale * (torch.finfo(ours.dtype).eps / 2 + torch.finfo(torch.float32).eps * sums**0.5) + more
    worst, allowed = error(ours, truth), 2 * error(plain, truth) + floor
    assert worst <= allowed, f"{name}: error {worst:.3g}, allowed {allowed:.3g}, plain PyTorch {error(plain, truth):.3g}"

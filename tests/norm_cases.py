"""The cases of group_norm_silu that its C++ and its Triton tests share."""

import torch

PARAMETERS = {
    "channels": [1, 3, 32, 64, 96, 128, 192, 256, 320, 384, 512, 576, 768, 1024, 1152],
    "groups": [1, 4, 8, 16, 32, "C"],
    "size": [(1, 1), (7, 5), (8, 8), (13, 16), (64, 64)],
    "batch": [0, 1, 3],
    "layout": ["contiguous", "channels_last", "view"],
    "dtype": ["float32", "bfloat16", "float16"],
    "given": ["", "add", "scale shift", "add scale shift", "stats", "add stats shift"],
    "silu": [True, False],
}


def divides(case) -> bool:
    return case["groups"] == "C" or case["channels"] % case["groups"] == 0


def elements(case) -> int:
    return case["batch"] * case["channels"] * case["size"][0] * case["size"][1]


def name_of(case) -> str:
    return "-".join(str(value).replace(" ", "+") for value in case.values())


def lay(t, layout):
    """t [N, C, H, W] in another layout; "view" has rows apart: no single stride over its pixels."""
    if layout == "view":
        return torch.cat((t, t), -1)[..., : t.shape[-1]]
    return t.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def arguments(case):
    """(dy, all arguments of the op); x far from 0, so that a one-pass variance would show."""
    n, c = case["batch"], case["channels"]
    groups, dtype = c if case["groups"] == "C" else case["groups"], getattr(torch, case["dtype"])
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator)

    x = lay((2 * make(n, c, *case["size"]) + 5).to(dtype), case["layout"])
    dy = lay(make(n, c, *case["size"]).to(dtype), case["layout"])
    # Statistics that are not x's own, as other kernels round them: 4 % of the standard deviation off.
    own = torch.stack((5 + 0.08 * make(n, groups), 4 * (1 + 0.1 * make(n, groups).abs())), -1)
    extras = [make(n, c) if name in case["given"].split() else None for name in ("add", "scale", "shift")]
    return dy, [x, make(c), make(c), groups, 1e-5, *extras, own if "stats" in case["given"] else None, case["silu"]]


def wide(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def condition(case, args) -> float:
    """How much the op magnifies the rounding of x + add: 1 / std of a group, 1/sqrt(eps) of a single element."""
    x, add, groups = args[0].double(), args[5], args[3]
    if x.numel() == 0 or args[8] is not None:
        return 1.0
    v = (x if add is None else x + add.double()[..., None, None]).reshape(x.shape[0], groups, -1)
    return float((v.var(-1, correction=0) + args[4]).rsqrt().max())

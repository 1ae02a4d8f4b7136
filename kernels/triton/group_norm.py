"""What the group_norm_silu kernels share: tiles, reductions over them, the affine map and the sigmoid.

A tile is [window, pixels], a window being neighbouring channels: BLOCK_G whole groups, or a part of one large group. For
channels-last (LAST) it is [pixels, window], so that its fastest axis is the fastest axis in memory. What belongs to a
channel or a group is a small vector, [BLOCK_W] or [BLOCK_G].
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdiff.kernels.layout import planes

WHOLE = 16384  # most elements of a tile that one program holds on chip
STREAMED = 4096  # elements of a tile in the kernels that pass over larger slices
PROGRAMS = 1024  # as many programs as a launch aims for


@triton.jit
def window(first_g, first_j, groups, CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr):
    """Channels c int64 [BLOCK_W], which of them exist, and which belong to which group, [BLOCK_G, BLOCK_W]."""
    w = first_j + tl.arange(0, BLOCK_W)
    c = (first_g * CHANNELS + w).to(tl.int64)
    known = (w < BLOCK_G * CHANNELS) & (c < groups * CHANNELS)
    member = ((w // CHANNELS)[None, :] == tl.arange(0, BLOCK_G)[:, None]) & known[None, :]
    return c, known, member


@triton.jit
def over_tile(v, LAST: tl.constexpr):
    """[BLOCK_W] -> broadcastable over the tile."""
    return v[None, :] if LAST else v[:, None]


@triton.jit
def over_pixels(v, LAST: tl.constexpr):
    """[BLOCK_P] -> broadcastable over the tile."""
    return v[:, None] if LAST else v[None, :]


@triton.jit
def sum_pixels(v, LAST: tl.constexpr):
    """Tile -> [BLOCK_W]."""
    return tl.sum(v, axis=0) if LAST else tl.sum(v, axis=1)


@triton.jit
def sum_groups(v, member):
    """[BLOCK_W] -> [BLOCK_G]."""
    return tl.sum(tl.where(member, v[None, :], 0.0), axis=1)


@triton.jit
def to_channels(v, member):
    """[BLOCK_G] -> [BLOCK_W]."""
    return tl.sum(tl.where(member, v[:, None], 0.0), axis=0)


@triton.jit
def shifted(x, add, at, nc, inside, known, HAS_ADD: tl.constexpr, LAST: tl.constexpr):
    """v = x + add in float32; 0 outside."""
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADD:
        more = tl.load(add + nc, mask=known, other=0.0).to(tl.float32)
        v = tl.where(inside, v + over_tile(more, LAST), 0.0)
    return v


@triton.jit
def affine(weight, bias, scale, shift, c, nc, known, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """(gain, offset), [BLOCK_W], with s = gain h + offset; nc = n C + c."""
    gain = tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    if HAS_SCALE:
        more = 1.0 + tl.load(scale + nc, mask=known, other=0.0).to(tl.float32)
        gain *= more
        offset *= more
    if HAS_SHIFT:
        offset += tl.load(shift + nc, mask=known, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def pair_of(table, n, first_g, groups, BLOCK_G: tl.constexpr):
    """The two entries of table [N, groups, 2] for the tile's groups, [BLOCK_G] each."""
    own = first_g + tl.arange(0, BLOCK_G)
    at = table + (n * groups + own) * 2
    first = tl.load(at, mask=own < groups, other=0.0).to(tl.float32)
    return first, tl.load(at + 1, mask=own < groups, other=0.0).to(tl.float32)


@triton.jit
def store_pair(table, n, first_g, groups, first, second, BLOCK_G: tl.constexpr):
    own = first_g + tl.arange(0, BLOCK_G)
    at = table + (n * groups + own) * 2
    tl.store(at, first, mask=own < groups)
    tl.store(at + 1, second, mask=own < groups)


@triton.jit
def inverse_sigmoid(s, PRECISE: tl.constexpr):
    """1 + exp(-s). The hardware's 2^u is good to 2 ulp of u; PRECISE carries what u = -s log2(e) lost in rounding."""
    t = tl.minimum(tl.maximum(-s, -87.0), 87.0)  # beyond, sigmoid is 0 or 1 to 38 digits
    u = t * 1.4426950216293335
    e = tl.exp2(u)
    if PRECISE:
        lost = tl.fma(t, 1.4426950216293335, -u) + t * 1.925963033500966e-08
        e += e * (lost * 0.6931471824645996)
    return 1.0 + e


@triton.jit
def rounded(r, factor, TYPE: tl.constexpr):
    """r in the type it is stored in; for E4M3 times *factor, at most the largest such number, NaN for NaN."""
    if TYPE.is_fp8():
        r = tl.clamp(r * tl.load(factor), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return r.to(TYPE)


@triton.jit
def reciprocal_std(var, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(var + eps))


class Shape(NamedTuple):
    """A launch: sizes and tile of x [N, C, ...] in `groups` groups."""

    n: int
    groups: int
    pixels: int
    channels: int  # of one group
    block_g: int
    block_w: int
    block_p: int
    last: bool

    @property
    def tiles_g(self):
        return triton.cdiv(self.groups, self.block_g)

    @property
    def tiles_j(self):
        return triton.cdiv(self.block_g * self.channels, self.block_w)

    @property
    def tiles_p(self):
        return triton.cdiv(self.pixels, self.block_p)

    @property
    def size(self):
        return self.block_w * self.block_p

    def chunks(self, tiles: int, programs: int) -> int:
        """Into how many chunks a slice of `tiles` tiles is cut when `programs` programs exist without cutting."""
        per = triton.cdiv(tiles, min(tiles, 64, max(1, triton.cdiv(PROGRAMS, programs))))
        return triton.cdiv(tiles, per)

    def options(self) -> dict:
        """Compile-time arguments; contraction is wanted here: it is faster and rounds less."""
        blocks = {"BLOCK_G": self.block_g, "BLOCK_W": self.block_w, "BLOCK_P": self.block_p, "LAST": self.last}
        warps = min(16, max(1, self.size // 512))
        return {"CHANNELS": self.channels, **blocks, "num_warps": warps, "enable_fp_fusion": True}


def shape_of(x: torch.Tensor, groups: int, limit: int | None = None) -> Shape:
    """The tile for x; without a limit it holds a whole slice, however large."""
    n, c = x.shape[:2]
    channels, pixels = c // groups, x.shape[2:].numel()
    _, stride_c, stride_p = planes(x)
    last = stride_c == 1 and stride_p != 1 and pixels > 1
    j, p = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
    # Channels-last: groups enough for 32 neighbouring channels, a memory sector or more.
    g = min(max(1, 32 // j), triton.next_power_of_2(groups)) if last else 1
    if limit is not None:
        j = min(j, max(64 if last else 16, limit // p))
        p = min(p, limit // (j * g))
    if not last and j >= channels:  # no tiny programs
        g = min(max(1, 1024 // (j * p)), triton.next_power_of_2(groups))
    while g > 1 and j * g * p > WHOLE:
        g //= 2
    return Shape(n, groups, pixels, channels, g, j * g, p, last)


def dense(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A contiguous [N, C] argument; `like`, which is never read, where there is none."""
    return like if t is None else t.contiguous()


def strided(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where its pixels have no single stride."""
    return x if planes(x) is not None else x.contiguous()

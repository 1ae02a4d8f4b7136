"""Device functions of docs/noise.md: Philox4x32-10 words and Box-Muller normals with the reference's bits.

Kernels that call these are launched with enable_fp_fusion=False: one contracted multiply-add changes about 1 % of the bits.
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, block, draw, domain):
    """Four uint32 words per block: seed int64 scalar, block int64 [...], draw and domain int32 scalars."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + draw.to(tl.uint32)
    c3 = tl.zeros_like(c0) + domain.to(tl.uint32)
    for _ in tl.static_range(10):
        hi0 = tl.umulhi(c0, 0xD2511F53)
        hi1 = tl.umulhi(c2, 0xCD9E8D57)
        lo0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        lo1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def quarter_turns(q, turn):
    """cos, sin of `turn` + q quarter turns, float32 q in [-1/2, 1/2]; of the uint32 turn the two lowest bits count."""
    q2 = q * q
    sin = q2 * -0.004602177068591118 + 0.07968022674322128
    sin = sin * q2 + -0.6459634900093079
    sin = (sin * q2 + 1.5707963705062866) * q
    cos = q2 * 0.0009067435166798532 + -0.02086152881383896
    cos = cos * q2 + 0.253669410943985
    cos = cos * q2 + -1.2337005138397217
    cos = cos * q2 + 1.0
    odd = (turn & 1) != 0
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    # Signs are flipped as bits: 0 - x, which `-x` may become, gives +0 for x = +0.
    c = (c.to(tl.uint32, bitcast=True) ^ (((turn + 1) & 2) << 30)).to(tl.float32, bitcast=True)
    s = (s.to(tl.uint32, bitcast=True) ^ ((turn & 2) << 30)).to(tl.float32, bitcast=True)
    return c, s


@triton.jit
def box_muller(w0, w1):
    """Two float32 normals r cos(theta), r sin(theta) from two uint32 words."""
    u = w0.to(tl.float32) * 2.0**-32 + 2.0**-33
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.15719091892242432 + -0.25763243436813354
    p = p * f + 0.2625753581523895
    p = p * f + -0.28362393379211426
    p = p * f + 0.33249107003211975
    p = p * f + -0.4000457227230072
    p = p * f + 0.5000162124633789
    p = p * f + -0.6666663289070129
    p = p * f + 1.0
    p = p * f + -2.0
    r = tl.sqrt_rn(exponent * -1.3862943649291992 + f * p)

    q = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    c, s = quarter_turns(q, w1 >> 30)
    return r * c, r * s


@triton.jit
def normals(seed, block, draw, domain):
    """float32 [C, 4 Q]: the four normals of each block of int64 [C, Q], side by side."""
    w0, w1, w2, w3 = words(seed, block, draw, domain)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))

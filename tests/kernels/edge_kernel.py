"""Box-Muller alone, on words that the test chooses."""

import triton
import triton.language as tl

from fastdiff.kernels.philox import box_muller


@triton.jit
def pairs(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    z0, z1 = box_muller(tl.load(a + i).to(tl.uint32, bitcast=True), tl.load(b + i).to(tl.uint32, bitcast=True))
    tl.store(out + i, z0)
    tl.store(out + SIZE + i, z1)

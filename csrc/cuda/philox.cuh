// Philox4x32-10 and Box-Muller for one thread; docs/noise.md fixes every rounding. The _rn intrinsics are never contracted,
// so that a kernel file is right whatever its flags (the build also says --fmad=false).
#pragma once

#include <cuda_runtime.h>

#include "philox.h"

namespace fastdiff {

// a b + c in two roundings.
__device__ inline float mul_add(float a, float b, float c) { return __fadd_rn(__fmul_rn(a, b), c); }
__device__ inline double mul_add(double a, double b, double c) { return __dadd_rn(__dmul_rn(a, b), c); }

struct Stream { uint32_t k0, k1, draw, domain; };  // a sample's seed words, and which of its noises

__device__ inline Stream stream_of(int64_t seed, uint32_t draw, uint32_t domain) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), draw, domain};
}

__device__ inline uint4 philox(Stream s, uint64_t block) {
  uint4 c = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), s.draw, s.domain};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t lo0 = kPhiloxM0 * c.x, hi0 = __umulhi(kPhiloxM0, c.x), lo1 = kPhiloxM1 * c.z,
        hi1 = __umulhi(kPhiloxM1, c.z);
    c = {hi1 ^ c.y ^ s.k0, lo1, hi0 ^ c.w ^ s.k1, lo0};
    s.k0 += kPhiloxW0;
    s.k1 += kPhiloxW1;
  }
  return c;
}

template <int N> __device__ float polynomial(const float (&c)[N], float x) {
  float y = c[0];
#pragma unroll
  for (int i = 1; i < N; ++i) y = mul_add(y, x, c[i]);
  return y;
}

__device__ inline float flip_sign(float v, uint32_t sign) { return __uint_as_float(__float_as_uint(v) ^ sign); }

__device__ inline void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  constexpr float log_poly[] = FASTDIFF_LOG_POLY, sin_poly[] = FASTDIFF_SIN_POLY, cos_poly[] = FASTDIFF_COS_POLY;
  const float u = mul_add(__uint2float_rn(w0), kTwoToMinus32, kTwoToMinus33);
  const int32_t shifted = __float_as_int(u) - kSqrtHalfBits;
  const float f = __fadd_rn(__int_as_float((shifted & 0x7FFFFF) + kSqrtHalfBits), -1.0f);
  const float r = __fsqrt_rn(mul_add(__int2float_rn(shifted >> 23), -kLn2Times2, __fmul_rn(f, polynomial(log_poly, f))));

  const float q = __fmul_rn(__int2float_rn(static_cast<int32_t>(w1 << 2)), kTwoToMinus32), q2 = __fmul_rn(q, q);
  const float sin = __fmul_rn(q, polynomial(sin_poly, q2)), cos = polynomial(cos_poly, q2);
  const uint32_t turn = w1 >> 30;
  const bool odd = turn & 1u;
  z0 = __fmul_rn(r, flip_sign(odd ? sin : cos, ((turn + 1u) & 2u) << 30));
  z1 = __fmul_rn(r, flip_sign(odd ? cos : sin, (turn & 2u) << 30));
}

// The four normals of a block.
__device__ inline void normals(const Stream& s, uint64_t block, float (&z)[4]) {
  const uint4 w = philox(s, block);
  box_muller(w.x, w.y, z[0], z[1]);
  box_muller(w.z, w.w, z[2], z[3]);
}

}  // namespace fastdiff

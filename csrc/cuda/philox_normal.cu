// philox_normal on CUDA: a thread makes 16 bytes of the result at a time. Same bits as fastdiff/ops/philox_normal.py:
// every operation rounds once (_rn intrinsics are never contracted; the build also says --fmad=false).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/philox_normal.h"
#include "philox.h"

namespace fastdiff {
namespace {

__device__ uint4 philox(uint32_t k0, uint32_t k1, uint64_t block, uint32_t draw, uint32_t domain) {
  uint4 c = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), draw, domain};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t lo0 = kPhiloxM0 * c.x, hi0 = __umulhi(kPhiloxM0, c.x), lo1 = kPhiloxM1 * c.z, hi1 = __umulhi(kPhiloxM1, c.z);
    c = {hi1 ^ c.y ^ k0, lo1, hi0 ^ c.w ^ k1, lo0};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

template <int N> __device__ float polynomial(const float (&c)[N], float x) {
  float y = c[0];
#pragma unroll
  for (int i = 1; i < N; ++i) y = __fadd_rn(__fmul_rn(y, x), c[i]);
  return y;
}

__device__ float flip_sign(float v, uint32_t sign) { return __uint_as_float(__float_as_uint(v) ^ sign); }

__device__ float2 box_muller(uint32_t w0, uint32_t w1) {
  constexpr float log_poly[] = FASTDIFF_LOG_POLY, sin_poly[] = FASTDIFF_SIN_POLY, cos_poly[] = FASTDIFF_COS_POLY;
  const float u = __fadd_rn(__fmul_rn(__uint2float_rn(w0), kTwoToMinus32), kTwoToMinus33);
  const int32_t shifted = __float_as_int(u) - kSqrtHalfBits;
  const float f = __fadd_rn(__int_as_float((shifted & 0x7FFFFF) + kSqrtHalfBits), -1.0f);
  const float squared = __fadd_rn(__fmul_rn(__int2float_rn(shifted >> 23), -kLn2Times2), __fmul_rn(f, polynomial(log_poly, f)));
  const float r = __fsqrt_rn(squared < 0.0f ? 0.0f : squared);  // keeps the -0 of u = 1, as the reference does

  const float q = __fmul_rn(__int2float_rn(static_cast<int32_t>(w1 << 2)), kTwoToMinus32), q2 = __fmul_rn(q, q);
  const float sin = __fmul_rn(q, polynomial(sin_poly, q2)), cos = polynomial(cos_poly, q2);
  const uint32_t turn = w1 >> 30;
  const bool odd = turn & 1u;
  return {__fmul_rn(r, flip_sign(odd ? sin : cos, ((turn + 1u) & 2u) << 30)), __fmul_rn(r, flip_sign(odd ? cos : sin, (turn & 2u) << 30))};
}

__device__ void convert(float z, float& out) { out = z; }
__device__ void convert(float z, double& out) { out = z; }
__device__ void convert(float z, __nv_bfloat16& out) { out = __float2bfloat16_rn(z); }
__device__ void convert(float z, __half& out) { out = __float2half_rn(z); }

// A thread's elements: whole blocks of 4, and 16 bytes a store.
template <class T> constexpr int kElements = sizeof(T) == 2 ? 8 : 4;

template <class T>
__global__ void __launch_bounds__(256) fill(T* out, const int64_t* seeds, uint32_t draw, uint32_t domain, int64_t batch, int64_t size) {
  constexpr int E = kElements<T>;
  const int64_t pieces = (size + E - 1) / E, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < batch * pieces; i += step) {
    const int64_t b = i / pieces, first = i % pieces * E;
    const uint64_t seed = static_cast<uint64_t>(seeds[b]);
    alignas(16) T z[E];
#pragma unroll
    for (int j = 0; j < E; j += 4) {
      const uint4 w = philox(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), (first + j) / 4, draw, domain);
      const float2 p = box_muller(w.x, w.y), q = box_muller(w.z, w.w);
      convert(p.x, z[j]), convert(p.y, z[j + 1]), convert(q.x, z[j + 2]), convert(q.y, z[j + 3]);
    }
    T* to = out + b * size + first;
    if (size % E == 0) {  // every piece is whole and 16-byte aligned
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof(z) / 16); ++j) reinterpret_cast<uint4*>(to)[j] = reinterpret_cast<const uint4*>(z)[j];
    } else {
#pragma unroll
      for (int j = 0; j < E; ++j)
        if (first + j < size) to[j] = z[j];
    }
  }
}

template <class T> void launch(const PhiloxNormal& a, cudaStream_t stream) {
  const int64_t threads = a.batch * ((a.size + kElements<T> - 1) / kElements<T>), blocks = (threads + 255) / 256;
  const int64_t most = 1 << 16;  // then each thread makes several
  fill<T><<<static_cast<unsigned>(blocks < most ? blocks : most), 256, 0, stream>>>(
      static_cast<T*>(a.out), a.seeds, static_cast<uint32_t>(a.draw), static_cast<uint32_t>(a.domain), a.batch, a.size);
}

}  // namespace

const char* philox_normal_cuda(const PhiloxNormal& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case Dtype::f32: launch<float>(a, s); break;
    case Dtype::bf16: launch<__nv_bfloat16>(a, s); break;
    case Dtype::f16: launch<__half>(a, s); break;
    case Dtype::f64: launch<double>(a, s); break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdiff

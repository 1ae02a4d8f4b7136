// add_noise on CUDA: x0 is read once, the noise made once, each of the K linear forms stored. Formula:
// fastdiff/ops/add_noise.py.
#include "cuda/add_noise.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/philox.cuh"

namespace fastdiff {
namespace {

template <int E, class A, class T>
__global__ void __launch_bounds__(256, 2) forms(AddNoise a, Lie lie, Lie to) {
  begin();
  const int64_t end = a.c * a.s, stride = int64_t{gridDim.x} * blockDim.x * E;
  for (Place at{blockIdx.y, 0, end, a.s}; at.sample < a.n; at.sample += gridDim.y) {
    const Stream stream = stream_of(a.seeds[at.sample], static_cast<uint32_t>(a.draw), static_cast<uint32_t>(a.domain));
    const A* c = static_cast<const A*>(a.coefficients) + at.sample * a.k * 2;
    for (at.first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * E; at.first < end; at.first += stride) {
      A x[1][E], y[1][E];
      float z[E];
      read<1, E, T>(a.x0, lie, at, x);
#pragma unroll
      for (int i = 0; i < E; i += 4)
        normals(stream, static_cast<uint64_t>(at.first + i) / 4, *reinterpret_cast<float(*)[4]>(z + i));
      Place there = at;
#pragma unroll 1  // unrolled by four, nvcc 13.0 splits into words the stores of what remains, which for two forms is all
      for (int64_t k = 0; k < a.k; ++k, there.sample += a.n) {
#pragma unroll
        for (int i = 0; i < E; ++i) y[0][i] = mul_add(c[2 * k + 1], A(z[i]), c[2 * k] * x[0][i]);
        write<1, E, T>(View{a.out, end, a.s, 1, a.x0.dtype}, to, there, y);
      }
    }
  }
}

template <class A, class T> cudaError_t queue(const AddNoise& a, cudaStream_t stream) {
  constexpr int E = sizeof(T) == 2 ? 8 : 4;
  const View out{a.out, a.c * a.s, a.s, 1, a.x0.dtype};
  const bool whole = a.c * a.s % E == 0;
  const Lie lie = lie_of(a.x0, a.c, a.s, 1, E, whole), to = lie_of(out, a.c, a.s, 1, E, whole);
  return launch<forms<E, A, T>>({grid_of((a.c * a.s + E - 1) / E, a.n), 256, stream}, a, lie, to);
}

}  // namespace

const char* add_noise_cuda(const AddNoise& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.x0.dtype) {
    case Dtype::f32: return text_of(queue<float, float>(a, s));
    case Dtype::bf16: return text_of(queue<float, __nv_bfloat16>(a, s));
    case Dtype::f16: return text_of(queue<float, __half>(a, s));
    case Dtype::f64: return text_of(queue<double, double>(a, s));
  }
  return text_of(cudaErrorInvalidValue);
}

}  // namespace fastdiff

// philox_normal on CUDA: a thread makes 16 bytes of the result at a time. Same bits as fastdiff/ops/philox_normal.py.
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/philox.cuh"
#include "cuda/philox_normal.h"

namespace fastdiff {
namespace {

template <int E, class T>
__global__ void __launch_bounds__(256) fill(PhiloxNormal a, Lie lie) {
  begin();
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * E;
  for (Place at{blockIdx.y, 0, a.size, a.size}; at.sample < a.batch; at.sample += gridDim.y) {
    const Stream stream = stream_of(a.seeds[at.sample], static_cast<uint32_t>(a.draw), static_cast<uint32_t>(a.domain));
    for (at.first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * E; at.first < a.size; at.first += stride) {
      float z[1][E];
#pragma unroll
      for (int i = 0; i < E; i += 4)
        normals(stream, static_cast<uint64_t>(at.first + i) / 4, *reinterpret_cast<float(*)[4]>(z[0] + i));
      write<1, E, T>(View{a.out, a.size, a.size, 1, a.dtype}, lie, at, z);
    }
  }
}

template <class T> cudaError_t queue(const PhiloxNormal& a, cudaStream_t stream) {
  constexpr int E = sizeof(T) == 2 ? 8 : 4;
  const Lie lie = lie_of({a.out, a.size, a.size, 1, a.dtype}, 1, a.size, 1, E, a.size % E == 0);
  return launch<fill<E, T>>({grid_of((a.size + E - 1) / E, a.batch), 256, stream}, a, lie);
}

}  // namespace

const char* philox_normal_cuda(const PhiloxNormal& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (a.dtype) {
    case Dtype::f32: return text_of(queue<float>(a, s));
    case Dtype::bf16: return text_of(queue<__nv_bfloat16>(a, s));
    case Dtype::f16: return text_of(queue<__half>(a, s));
    case Dtype::f64: return text_of(queue<double>(a, s));
  }
  return text_of(cudaErrorInvalidValue);
}

}  // namespace fastdiff

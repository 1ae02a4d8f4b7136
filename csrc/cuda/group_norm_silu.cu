// Channels-last group_norm_silu: x is copied to shared memory once; its sums, its squared deviations from the mean and its
// values are taken from there. A slice that one block should not hold belongs to a cluster, whose blocks exchange moments.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/group_norm_silu_block.h"
#include "cuda/launch.cuh"

namespace fastdiff {
namespace {

static_assert(kThreads == 256);

template <class T, bool silu, bool given>
__global__ void __launch_bounds__(256, 2) normalise(const __grid_constant__ GroupNormSiluCuda a,
                                                    const __grid_constant__ NormPlan p) {
  begin();
  extern __shared__ __align__(16) char shared[];
  const NormBlock<T> block(a, p, blockIdx.x, shared);
  const int t = static_cast<int>(threadIdx.x);
  block.template fetch<given>(a, t);
  if constexpr (given) {
    block.template merge<given>(a, p, t, [&](int) { return block.part; });
  } else {
    block.sum(t);
    __syncthreads();
    block.fold(0, t);
    __syncthreads();
    block.block_mean(t);
    __syncthreads();
    block.deviations(t);
    __syncthreads();
    block.fold(0, t);
    if (block.kPrecise) block.fold(1, t);
    __syncthreads();
    block.block_moments(t);
#if __CUDA_ARCH__ >= 900
    if (p.ranks > 1) {
      const auto cluster = cooperative_groups::this_cluster();
      cluster.sync();
      block.template merge<given>(a, p, t,
                                  [&](int r) { return static_cast<const float*>(cluster.map_shared_rank(block.part, r)); });
      cluster.barrier_arrive();  // no block may end while another reads its moments: the wait is the last thing done
    } else
#endif
    {
      __syncthreads();
      block.template merge<given>(a, p, t, [&](int) { return block.part; });
    }
  }
  __syncthreads();
  block.coefficients(t);
  __syncthreads();
  block.template apply<silu, given>(a, t);
#if __CUDA_ARCH__ >= 900
  if (!given && p.ranks > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
}

struct Device {
  int multiprocessors, shared, ranks;
};

Device device_of(int id) {
  constexpr int most = 64;
  static std::atomic<int> known[most][3];
  const auto ask = [&](cudaDeviceAttr what, int slot) {
    int value = id < most ? known[id][slot].load(std::memory_order_relaxed) : 0;
    if (value == 0 && cudaDeviceGetAttribute(&value, what, id) == cudaSuccess && id < most) known[id][slot] = value;
    return value;
  };
  const int major = ask(cudaDevAttrComputeCapabilityMajor, 2);
  return {ask(cudaDevAttrMultiProcessorCount, 0), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, 1), major >= 9 ? 8 : 1};
}

template <class T, bool silu, bool given>
cudaError_t queue(const GroupNormSiluCuda& a, const NormPlan& p, cudaStream_t stream) {
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id)) return error;
  static std::atomic<uint64_t> allowed{0};  // devices where this kernel may have all the shared memory there is
  const uint64_t bit = id < 64 ? uint64_t{1} << id : 0;
  if (!(allowed.load(std::memory_order_relaxed) & bit)) {
    const cudaError_t error =
        cudaFuncSetAttribute(normalise<T, silu, given>, cudaFuncAttributeMaxDynamicSharedMemorySize, device_of(id).shared);
    if (error) return error;
    allowed |= bit;
  }
  const auto blocks = static_cast<unsigned>(a.n * p.slices * p.ranks), cluster = given ? 1u : static_cast<unsigned>(p.ranks);
  return launch<normalise<T, silu, given>>({blocks, kThreads, stream, static_cast<size_t>(p.shared), cluster}, a, p);
}

template <class T> cudaError_t choose(const GroupNormSiluCuda& a, const NormPlan& p, cudaStream_t s) {
  if (a.given) return a.silu ? queue<T, true, true>(a, p, s) : queue<T, false, true>(a, p, s);
  return a.silu ? queue<T, true, false>(a, p, s) : queue<T, false, false>(a, p, s);
}

}  // namespace

NormPlan plan_norm_here(const GroupNormSiluCuda& a) {
  int id = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return {};
  const Device device = device_of(id);
  return plan_norm(a, device.multiprocessors, device.shared, device.ranks);
}

const char* group_norm_silu_cuda(const GroupNormSiluCuda& a, const NormPlan& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (a.dtype) {
    case Dtype::f32: error = choose<float>(a, p, s); break;
    case Dtype::bf16: error = choose<bfloat16>(a, p, s); break;
    case Dtype::f16: error = choose<float16>(a, p, s); break;
    case Dtype::f64: break;
  }
  return text_of(error);
}

}  // namespace fastdiff

// How kernels are launched here: by programmatic dependent launch where it is there, as Triton's are. The rule and why it
// suffices: kernels/triton/dependent.py.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastdiff {

// The first statement of every kernel: no thread may touch global memory before.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// FASTDIFF_PDL=0 launches as for older GPUs.
inline bool dependent_wanted() {
  static const bool wanted = [] {
    const char* chosen = std::getenv("FASTDIFF_PDL");
    return chosen == nullptr || std::strcmp(chosen, "0") != 0;
  }();
  return wanted;
}

// Whether the code of `kernel` that runs on the current device waits in begin(). Its own version tells, not the device's:
// where it was built for sm_80 alone, as PTX, it runs on every later GPU too.
template <auto kernel> cudaError_t waits(bool& answer) {
  constexpr int most = 64;
  static std::atomic<int> versions[most];  // by device; 0: not asked yet
  int id = 0;
  if (const cudaError_t error = cudaGetDevice(&id)) return error;
  int version = id < most ? versions[id].load(std::memory_order_relaxed) : 0;
  if (version == 0) {
    cudaFuncAttributes of{};
    if (const cudaError_t error = cudaFuncGetAttributes(&of, kernel)) return error;
    version = of.ptxVersion;
    if (id < most) versions[id].store(version, std::memory_order_relaxed);
  }
  answer = version >= 90;
  return cudaSuccess;
}

struct Launch {
  dim3 grid;
  unsigned threads;
  cudaStream_t stream;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks
};

template <auto kernel, class... Arguments> cudaError_t launch(const Launch& l, const Arguments&... arguments) {
  bool dependent = false;
  if (dependent_wanted())
    if (const cudaError_t error = waits<kernel>(dependent)) return error;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid, config.blockDim = l.threads, config.dynamicSmemBytes = l.shared, config.stream = l.stream;
  config.attrs = attributes;
  if (dependent) {
    cudaLaunchAttribute& serial = attributes[config.numAttrs++];
    serial.id = cudaLaunchAttributeProgrammaticStreamSerialization, serial.val.programmaticStreamSerializationAllowed = 1;
  }
  if (l.cluster > 1) {
    cudaLaunchAttribute& blocks = attributes[config.numAttrs++];
    blocks.id = cudaLaunchAttributeClusterDimension;
    blocks.val.clusterDim.x = l.cluster, blocks.val.clusterDim.y = blocks.val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// What the bridge raises: an error's text, or null. The runtime forgets it, or the next to ask would take it for its own.
inline const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace fastdiff

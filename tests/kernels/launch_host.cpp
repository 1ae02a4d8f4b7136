// csrc/cuda/launch.cuh on the host: in place of the CUDA runtime something that records what is launched. Built and called by
// test_dependent_launch.py, with an empty cuda_runtime.h on the path.
#include <cstddef>

#define __device__
#define __forceinline__ inline

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
typedef void* cudaStream_t;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes { int ptxVersion; };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace {
int device, version, asked;
int* launched;
}  // namespace

cudaError_t cudaGetDevice(int* id) { return *id = device, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, F) {
  ++asked, a->ptxVersion = version;
  return version ? cudaSuccess : cudaErrorInvalidValue;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...), Arguments&&... arguments) {
  kernel(arguments...);
  launched[0] = static_cast<int>(c->gridDim.x), launched[1] = static_cast<int>(c->blockDim.x);
  launched[2] = static_cast<int>(c->dynamicSmemBytes);
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const cudaLaunchAttribute& each = c->attrs[i];
    if (each.id == cudaLaunchAttributeClusterDimension) launched[3] = static_cast<int>(each.val.clusterDim.x);
    else launched[4] = each.val.programmaticStreamSerializationAllowed;
  }
  return cudaSuccess;
}

#include "cuda/launch.cuh"

namespace {
void kernel(int argument) {
  fastdiff::begin();
  launched[5] = argument;
}
}  // namespace

// seen: grid, threads, shared memory, cluster, whether dependent, argument, how often the runtime was asked for the version.
extern "C" const char* launch_on_host(int on, int ptx, int cluster, int argument, int* seen) {
  device = on, version = ptx, launched = seen;
  const auto error = fastdiff::launch<kernel>({7, 256, nullptr, 1024, static_cast<unsigned>(cluster)}, argument);
  seen[6] = asked;
  return fastdiff::text_of(error);
}

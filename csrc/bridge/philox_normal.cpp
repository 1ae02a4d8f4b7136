#include "cpu/philox_normal.h"

#include "bridge/bridge.h"
#ifdef USE_CUDA
#include "cuda/philox_normal.h"
#endif

namespace fastdiff {
namespace {

Tensor philox_normal_cpu(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape, ScalarType dtype) {
  check_cpu(seeds, "seeds");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "seeds: expected int64 [B]");
  shape.insert(shape.begin(), seeds.size(0));
  Tensor out = torch::stable::new_empty(seeds, shape, dtype);
  if (out.numel() == 0) return out;
  const Tensor keys = torch::stable::contiguous(seeds);
  philox_normal({out.data_ptr(), dtype_of(dtype, "dtype"), static_cast<const int64_t*>(keys.data_ptr()), draw, domain,
                 seeds.size(0), out.numel() / seeds.size(0)});
  return out;
}

#ifdef USE_CUDA
Tensor philox_normal_on_cuda(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape, ScalarType dtype) {
  STD_TORCH_CHECK(seeds.is_cuda(), "seeds: must be on a CUDA device");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "seeds: expected int64 [B]");
  const auto device = seeds.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  shape.insert(shape.begin(), seeds.size(0));
  Tensor out = torch::stable::new_empty(seeds, shape, dtype);
  if (out.numel() == 0) return out;
  const Tensor keys = torch::stable::contiguous(seeds);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream");
  const char* error = philox_normal_cuda({out.data_ptr(), dtype_of(dtype, "dtype"), static_cast<const int64_t*>(keys.data_ptr()),
                                          draw, domain, seeds.size(0), out.numel() / seeds.size(0)}, stream);
  STD_TORCH_CHECK(!error, "philox_normal: ", error ? error : "");
  return out;
}
#endif

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("philox_normal", TORCH_BOX(&fastdiff::philox_normal_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("philox_normal", TORCH_BOX(&fastdiff::philox_normal_on_cuda)); }
#endif

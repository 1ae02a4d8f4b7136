#include "cpu/philox_normal.h"

#include "bridge/bridge.h"
#ifdef USE_CUDA
#include "cuda/philox_normal.h"
#endif

namespace fastdiff {
namespace {

// The result, yet to be filled; `keys` keeps the seeds that a.seeds points to.
Tensor prepared(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape, ScalarType dtype,
                Tensor& keys, PhiloxNormal& a) {
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1, "seeds: expected int64 [B]");
  for (int64_t size : shape) STD_TORCH_CHECK(size >= 0, "shape: ", size, " is negative");
  shape.insert(shape.begin(), seeds.size(0));
  const Dtype type = dtype_of(dtype, "dtype");
  Tensor out = torch::stable::new_empty(seeds, shape, dtype);
  keys = as_contiguous(seeds);
  a = {out.data_ptr(), type, static_cast<const int64_t*>(keys.data_ptr()), draw, domain, seeds.size(0), 0};
  if (out.numel() > 0) a.size = out.numel() / seeds.size(0);
  return out;
}

Tensor philox_normal_cpu(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape, ScalarType dtype) {
  check_cpu(seeds, "seeds");
  Tensor keys = seeds;
  PhiloxNormal a;
  Tensor out = prepared(seeds, draw, domain, std::move(shape), dtype, keys, a);
  if (a.size > 0) philox_normal(a);
  return out;
}

#ifdef USE_CUDA
Tensor philox_normal_on_cuda(const Tensor& seeds, int64_t draw, int64_t domain, std::vector<int64_t> shape,
                             ScalarType dtype) {
  STD_TORCH_CHECK(seeds.is_cuda(), "seeds: must be on a CUDA device");
  const OnDevice here(seeds);
  Tensor keys = seeds;
  PhiloxNormal a;
  Tensor out = prepared(seeds, draw, domain, std::move(shape), dtype, keys, a);
  if (a.size > 0) check_launch(philox_normal_cuda(a, here.stream), "philox_normal");
  return out;
}
#endif

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("philox_normal", TORCH_BOX(&fastdiff::philox_normal_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("philox_normal", TORCH_BOX(&fastdiff::philox_normal_on_cuda)); }
#endif

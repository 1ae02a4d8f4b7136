#include "cpu/embedding.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

Tensor embedding_cpu(const Tensor& t, const Tensor& freqs, double scale, bool sin_first, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 1, "t: expected [B]");
  STD_TORCH_CHECK(freqs.dim() == 1, "freqs: expected [H]");
  dtype_of(t.scalar_type(), "t"), dtype_of(freqs.scalar_type(), "freqs");
  const int64_t n = t.size(0), h = freqs.size(0), rows[] = {n}, columns[] = {h}, shape[] = {n, 2 * h};
  const Tensor times = parameter(t, ScalarType::Double, Shape(rows, 1), "t");
  const Tensor table = parameter(freqs, ScalarType::Double, Shape(columns, 1), "freqs");
  Tensor out = torch::stable::new_empty(t, Shape(shape, 2), dtype);
  if (out.numel() == 0) return out;
  const bool wide = t.scalar_type() == ScalarType::Double || freqs.scalar_type() == ScalarType::Double;
  embedding({static_cast<const double*>(times.data_ptr()), static_cast<const double*>(table.data_ptr()), scale,
             out.data_ptr(), dtype_of(dtype, "dtype"), n, h, sin_first, wide});
  return out;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("embedding", TORCH_BOX(&fastdiff::embedding_cpu)); }

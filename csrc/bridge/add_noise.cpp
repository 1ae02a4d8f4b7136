#include "cpu/add_noise.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

Tensor add_noise_cpu(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients, int64_t draw, int64_t domain) {
  STD_TORCH_CHECK(x0.dim() >= 1, "x0: expected [B, ...]");
  STD_TORCH_CHECK(coefficients.dim() == 3, "coefficients: expected [B, K, 2]");
  const int64_t n = x0.size(0), k = coefficients.size(1), expected[] = {n, k, 2};
  std::vector<int64_t> shape(x0.sizes().begin(), x0.sizes().end());
  shape.insert(shape.begin(), k);
  Tensor out = torch::stable::new_empty(x0, shape);
  const Tensor c = parameter(coefficients, accumulate(x0), Shape(expected, 3), "coefficients");
  const Tensor keys = torch::stable::contiguous(seeds);
  AddNoise a{};
  a.seeds = seed_data(keys, n);
  if (out.numel() == 0) return out;
  Tensor x = x0;
  auto view = try_view(x, "x0");
  if (!view) x = torch::stable::contiguous(x), view = try_view(x, "x0");
  a.x0 = *view, a.out = out.data_ptr(), a.coefficients = c.data_ptr();
  a.n = n, a.c = x.dim() > 1 ? x.size(1) : 1, a.s = spatial(x), a.k = k, a.draw = draw, a.domain = domain;
  add_noise(a);
  return out;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("add_noise", TORCH_BOX(&fastdiff::add_noise_cpu)); }

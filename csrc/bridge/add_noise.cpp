#include "cpu/add_noise.h"

#include "bridge/bridge.h"
#ifdef USE_CUDA
#include "cuda/add_noise.h"
#endif

namespace fastdiff {
namespace {

// Everything checked, x0 seen as [n, c, s]; launch(arguments) fills the result.
template <class Launch>
Tensor run(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients, int64_t draw, int64_t domain,
           const Launch& launch) {
  STD_TORCH_CHECK(x0.dim() >= 1, "x0: expected [B, ...]");
  const int64_t n = x0.size(0);
  STD_TORCH_CHECK(coefficients.dim() == 3 && coefficients.size(0) == n && coefficients.size(2) == 2,
                  "coefficients: expected [", n, ", K, 2]");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1 && seeds.size(0) == n,
                  "seeds: expected int64 [", n, "]");
  check_device(seeds, x0, "seeds"), check_device(coefficients, x0, "coefficients");
  dtype_of(x0.scalar_type(), "x0"), dtype_of(coefficients.scalar_type(), "coefficients");
  std::vector<int64_t> shape(x0.sizes().begin(), x0.sizes().end());
  shape.insert(shape.begin(), coefficients.size(1));
  Tensor out = torch::stable::new_empty(x0, shape);
  if (out.numel() == 0) return out;
  const ScalarType type = accumulate(x0);
  const bool fits = coefficients.scalar_type() == type;
  const Tensor c = as_contiguous(fits ? coefficients : torch::stable::to(coefficients, type));
  const Tensor keys = as_contiguous(seeds);
  const InPlace x(x0, "x0");
  AddNoise a{};
  a.seeds = static_cast<const int64_t*>(keys.data_ptr()), a.coefficients = c.data_ptr();
  a.x0 = x.view, a.out = out.data_ptr();
  a.n = n, a.c = x0.dim() > 1 ? x0.size(1) : 1, a.s = spatial(x0), a.k = coefficients.size(1), a.draw = draw,
      a.domain = domain;
  launch(a);
  return out;
}

Tensor add_noise_cpu(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients, int64_t draw, int64_t domain) {
  check_cpu(x0, "x0");
  return run(x0, seeds, coefficients, draw, domain, [](const AddNoise& a) { add_noise(a); });
}

#ifdef USE_CUDA
Tensor add_noise_on_cuda(const Tensor& x0, const Tensor& seeds, const Tensor& coefficients, int64_t draw, int64_t domain) {
  STD_TORCH_CHECK(x0.is_cuda(), "x0: must be on a CUDA device");
  const OnDevice here(x0);
  return run(x0, seeds, coefficients, draw, domain,
             [&](const AddNoise& a) { check_launch(add_noise_cuda(a, here.stream), "add_noise"); });
}
#endif

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("add_noise", TORCH_BOX(&fastdiff::add_noise_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("add_noise", TORCH_BOX(&fastdiff::add_noise_on_cuda)); }
#endif

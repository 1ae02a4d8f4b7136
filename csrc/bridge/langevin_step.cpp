#include "cpu/langevin_step.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

void langevin_step_cpu(Tensor x, const Tensor& f, Tensor net_in, std::optional<Tensor> mean, const Tensor& seeds,
                       const Tensor& coefficients, const Tensor& draws, const Tensor& row, int64_t norms) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected [B, ...]");
  STD_TORCH_CHECK(norms >= 0 && norms < langevin::kNorms, "norms: ", norms, " is not known");
  const int64_t rows = coefficients.dim() == 2 ? coefficients.size(0) : -1, n = x.size(0);
  STD_TORCH_CHECK(rows >= 0 && coefficients.size(1) == langevin::kColumns && coefficients.scalar_type() == type,
                  "coefficients: expected x's dtype, [rows, ", int(langevin::kColumns), "]");
  STD_TORCH_CHECK(draws.scalar_type() == ScalarType::Int && draws.dim() == 1 && draws.size(0) == rows,
                  "draws: expected int32 [rows]");
  STD_TORCH_CHECK(row.scalar_type() == ScalarType::Long && row.dim() == 1 && (row.size(0) == 1 || row.size(0) == n),
                  "row: expected int64 [1] or [B]");
  check_cpu(coefficients, "coefficients"), check_cpu(draws, "draws"), check_cpu(row, "row");
  check_shape(f, x, "F"), check_shape(net_in, x, "net_in");
  check_writable(x, "x"), check_writable(net_in, "net_in");
  if (mean) {
    check_writable(*mean, "mean");
    check_shape(*mean, x, "mean");
    STD_TORCH_CHECK(mean->scalar_type() == type, "mean: expected x's dtype");
  }

  const Tensor table = as_contiguous(coefficients), words = as_contiguous(draws);
  const Tensor keys = as_contiguous(seeds), row_list = as_contiguous(row);
  LangevinStep a{};
  a.seeds = seed_data(keys, n);
  a.n = n, a.c = x.dim() > 1 ? x.size(1) : 1, a.s = spatial(x), a.norms = norms;
  a.coefficients = table.data_ptr(), a.draws = static_cast<const int32_t*>(words.data_ptr());
  a.row = static_cast<const int64_t*>(row_list.data_ptr()), a.row_per_sample = row.size(0) == n && n != 1;
  for (int64_t i = 0; i < row.size(0); ++i)
    STD_TORCH_CHECK(a.row[i] >= 0 && a.row[i] < rows, "row: ", a.row[i], " is outside the plan's ", rows, " rows");
  if (x.numel() == 0) return;

  InPlace state(x, "x"), input(net_in, "net_in"), network(f, "F"), kept(mean ? *mean : x, "mean");
  a.x = state.view, a.f = network.view, a.net_in = input.view;
  if (mean) a.mean = kept.view;
  langevin_step(a);
  state.finish(), input.finish();
  if (mean) kept.finish();
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("langevin_step", TORCH_BOX(&fastdiff::langevin_step_cpu)); }

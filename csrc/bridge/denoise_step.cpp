#include "cpu/denoise_step.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

void denoise_step_cpu(Tensor x, std::optional<Tensor> f, Tensor saved, Tensor history, Tensor net_in, const Tensor& seeds,
                      const Tensor& coefficients, const Tensor& codes, const Tensor& row) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 1 && history.dim() == x.dim() + 1, "history: expected [slots, *x.shape]");
  STD_TORCH_CHECK(saved.scalar_type() == type && history.scalar_type() == type && coefficients.scalar_type() == type,
                  "saved, history and coefficients must have x's dtype");
  const int64_t rows = coefficients.dim() == 2 ? coefficients.size(0) : -1, n = x.size(0);
  STD_TORCH_CHECK(rows >= 0 && coefficients.size(1) == column::kCount, "coefficients: expected [rows, ", int(column::kCount), "]");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Int && codes.dim() == 2 && codes.size(0) == rows && codes.size(1) == code::kCount,
                  "codes: expected int32 [rows, ", int(code::kCount), "]");
  STD_TORCH_CHECK(row.scalar_type() == ScalarType::Long && row.dim() == 1 && (row.size(0) == 1 || row.size(0) == n), "row: expected int64 [1] or [B]");
  check_cpu(coefficients, "coefficients"), check_cpu(codes, "codes"), check_cpu(row, "row");
  check_shape(net_in, x, "net_in");
  if (f) check_shape(*f, x, "F");
  const bool has_saved = saved.numel() > 0;
  if (has_saved) check_shape(saved, x, "saved");
  for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(history.size(i + 1) == x.size(i), "history: expected [slots, *x.shape]");

  const Tensor table = torch::stable::contiguous(coefficients), code_table = torch::stable::contiguous(codes);
  const Tensor keys = torch::stable::contiguous(seeds), row_list = torch::stable::contiguous(row);
  DenoiseStep a{};
  a.seeds = seed_data(keys, n);
  a.n = n, a.c = x.dim() > 1 ? x.size(1) : 1, a.s = spatial(x), a.slots = history.size(0);
  a.coefficients = table.data_ptr(), a.codes = static_cast<const int32_t*>(code_table.data_ptr());
  a.row = static_cast<const int64_t*>(row_list.data_ptr()), a.row_per_sample = row.size(0) == n && n != 1;
  for (int64_t i = 0; i < row.size(0); ++i)
    STD_TORCH_CHECK(a.row[i] >= 0 && a.row[i] < rows, "row: ", a.row[i], " is outside the plan's ", rows, " rows");
  if (x.numel() == 0) return;

  InPlace state(x, "x"), input(net_in, "net_in"), save(has_saved ? saved : x, "saved");
  Tensor slots = history;
  if (a.slots > 0) {
    auto first = try_view(torch::stable::select(slots, 0, 0), "history");
    if (!first) slots = torch::stable::contiguous(slots), first = try_view(torch::stable::select(slots, 0, 0), "history");
    a.history = *first, a.slot_stride = slots.stride(0);
  }
  std::optional<InPlace> network;
  if (f) network.emplace(*f, "F"), a.f = network->view;
  a.x = state.view, a.net_in = input.view;
  if (has_saved) a.saved = save.view;
  denoise_step(a);
  state.finish(), input.finish();
  if (has_saved) save.finish();
  if (slots.get() != history.get()) torch::stable::copy_(history, slots);
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("denoise_step", TORCH_BOX(&fastdiff::denoise_step_cpu)); }

#include "cpu/denoise_step.h"

#include "bridge/bridge.h"
#ifdef USE_CUDA
#include "cuda/denoise_step.h"
#endif

namespace fastdiff {
namespace {

// Fills in all that does not depend on where the tensors lie; the tables must be contiguous and on x's device.
DenoiseStep checked(const Tensor& x, const std::optional<Tensor>& f, const Tensor& saved, const Tensor& history,
                    const Tensor& net_in, const Tensor& seeds, const Tensor& coefficients, const Tensor& codes,
                    const Tensor& row, const std::optional<Tensor>& f_u, const std::optional<Tensor>& guidance,
                    const std::optional<Tensor>& v) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected float32 or float64");
  STD_TORCH_CHECK(x.dim() >= 1 && history.dim() == x.dim() + 1, "history: expected [slots, *x.shape]");
  STD_TORCH_CHECK(saved.scalar_type() == type && history.scalar_type() == type && coefficients.scalar_type() == type,
                  "saved, history and coefficients must have x's dtype");
  const int64_t rows = coefficients.dim() == 2 ? coefficients.size(0) : -1, n = x.size(0);
  STD_TORCH_CHECK(rows >= 0 && coefficients.size(1) == column::kCount, "coefficients: expected [rows, ", int(column::kCount),
                  "]");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Int && codes.dim() == 2 && codes.size(0) == rows &&
                  codes.size(1) == code::kCount,
                  "codes: expected int32 [rows, ", int(code::kCount), "]");
  STD_TORCH_CHECK(row.scalar_type() == ScalarType::Long && row.dim() == 1 && (row.size(0) == 1 || row.size(0) == n),
                  "row: expected int64 [1] or [B]");
  STD_TORCH_CHECK(seeds.scalar_type() == ScalarType::Long && seeds.dim() == 1 && seeds.size(0) == n,
                  "seeds: expected int64 [", n, "]");
  if (f) check_shape(*f, x, "F");
  if (f_u) check_shape(*f_u, x, "F_u");
  if (v) check_shape(*v, x, "V");
  STD_TORCH_CHECK(f || (!f_u && !v), "F: None, a row without evaluation, but F_u or V is given");
  STD_TORCH_CHECK(f_u.has_value() == guidance.has_value(), "F_u and guidance come together");
  STD_TORCH_CHECK(!guidance ||
                  (guidance->scalar_type() == type && guidance->dim() == 1 &&
                   (guidance->size(0) == 1 || guidance->size(0) == n)),
                  "guidance: expected x's dtype and [1] or [B]");
  if (saved.numel() > 0) check_shape(saved, x, "saved");
  bool fits = net_in.dim() == x.dim() && (n == 0 ? net_in.size(0) == 0 : net_in.size(0) >= n && net_in.size(0) % n == 0);
  for (int64_t i = 0; i < x.dim(); ++i) {
    STD_TORCH_CHECK(history.size(i + 1) == x.size(i), "history: expected [slots, *x.shape]");
    fits = fits && (i == 0 || net_in.size(i) == x.size(i));
  }
  STD_TORCH_CHECK(fits, "net_in: expected x's shape, or a whole number of copies of it, one after another");
  check_writable(x, "x"), check_writable(saved, "saved"), check_writable(history, "history");
  check_writable(net_in, "net_in");
  check_device(saved, x, "saved"), check_device(history, x, "history"), check_device(net_in, x, "net_in");
  check_device(seeds, x, "seeds"), check_device(coefficients, x, "coefficients"), check_device(codes, x, "codes"),
      check_device(row, x, "row");
  if (f) check_device(*f, x, "F");
  if (f_u) check_device(*f_u, x, "F_u"), check_device(*guidance, x, "guidance");
  if (v) check_device(*v, x, "V");
  DenoiseStep a{};
  a.rows = rows, a.n = n, a.c = x.dim() > 1 ? x.size(1) : 1, a.s = spatial(x), a.slots = history.size(0),
      a.copies = n ? net_in.size(0) / n : 1;
  a.seeds = static_cast<const int64_t*>(seeds.data_ptr());
  a.coefficients = coefficients.data_ptr(), a.codes = static_cast<const int32_t*>(codes.data_ptr());
  a.row = static_cast<const int64_t*>(row.data_ptr()), a.row_per_sample = row.size(0) == n && n != 1;
  a.guidance = data(guidance), a.guidance_per_sample = guidance && guidance->size(0) == n && n != 1;
  return a;
}

std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return as_contiguous(*t);
}

// Gives the tensors to launch(arguments) as views, or as copies that are returned where no view serves.
template <class Launch>
void run(DenoiseStep& a, const Tensor& x, const std::optional<Tensor>& f, const Tensor& saved, Tensor history,
         const Tensor& net_in, const std::optional<Tensor>& f_u, const std::optional<Tensor>& v, const Launch& launch) {
  const bool has_saved = saved.numel() > 0;
  InPlace state(x, "x"), input(net_in, "net_in"), save(has_saved ? saved : x, "saved");
  Tensor slots = history;
  if (a.slots > 0) {
    auto first = view_of(slots, "history", 1);
    if (!first) slots = as_contiguous(slots), first = view_of(slots, "history", 1);
    a.history = *first, a.slot_stride = slots.stride(0);
  }
  std::optional<InPlace> network, other, variance;
  if (f) network.emplace(*f, "F"), a.f = network->view;
  if (f_u) other.emplace(*f_u, "F_u"), a.f_u = other->view;
  if (v) variance.emplace(*v, "V"), a.v = variance->view;
  a.x = state.view, a.net_in = input.view;
  if (has_saved) a.saved = save.view;
  launch(a);
  state.finish(), input.finish();
  if (has_saved) save.finish();
  if (slots.get() != history.get()) torch::stable::copy_(history, slots);
}

void denoise_step_cpu(Tensor x, std::optional<Tensor> f, Tensor saved, Tensor history, Tensor net_in, const Tensor& seeds,
                      const Tensor& coefficients, const Tensor& codes, const Tensor& row, std::optional<Tensor> f_u,
                      std::optional<Tensor> guidance, std::optional<Tensor> v) {
  check_cpu(x, "x");
  const Tensor table = as_contiguous(coefficients), code_table = as_contiguous(codes);
  const Tensor keys = as_contiguous(seeds), row_list = as_contiguous(row);
  const std::optional<Tensor> weights = packed(guidance);
  DenoiseStep a = checked(x, f, saved, history, net_in, keys, table, code_table, row_list, f_u, weights, v);
  for (int64_t i = 0; i < row.size(0); ++i)
    STD_TORCH_CHECK(a.row[i] >= 0 && a.row[i] < table.size(0), "row: ", a.row[i], " is outside the plan's ", table.size(0),
                    " rows");
  if (x.numel() == 0) return;

  run(a, x, f, saved, history, net_in, f_u, v, [](const DenoiseStep& args) { denoise_step(args); });
}

#ifdef USE_CUDA
// The kernel reads and writes one network type, x's or a narrower one; others come and go by way of x's.
void denoise_step_on_cuda(Tensor x, std::optional<Tensor> f, Tensor saved, Tensor history, Tensor net_in,
                          const Tensor& seeds, const Tensor& coefficients, const Tensor& codes, const Tensor& row,
                          std::optional<Tensor> f_u, std::optional<Tensor> guidance, std::optional<Tensor> v) {
  STD_TORCH_CHECK(x.is_cuda(), "x: must be on a CUDA device");
  const OnDevice here(x);
  const Tensor table = as_contiguous(coefficients), code_table = as_contiguous(codes);
  const Tensor keys = as_contiguous(seeds), row_list = as_contiguous(row);
  const std::optional<Tensor> weights = packed(guidance);
  DenoiseStep a = checked(x, f, saved, history, net_in, keys, table, code_table, row_list, f_u, weights, v);
  if (x.numel() == 0) return;
  bool alike = x.scalar_type() == ScalarType::Float;
  for (const auto* t : {&f, &f_u, &v}) alike = alike && (!*t || (*t)->scalar_type() == net_in.scalar_type());
  const bool convert = !alike || net_in.scalar_type() == ScalarType::Double;
  for (auto* t : {&f, &f_u, &v})
    if (convert && *t && (*t)->scalar_type() != x.scalar_type()) *t = torch::stable::to(**t, x.scalar_type());
  const bool narrow = convert && net_in.scalar_type() != x.scalar_type();
  const Tensor next = narrow ? torch::stable::to(net_in, x.scalar_type()) : net_in;
  run(a, x, f, saved, history, next, f_u, v,
      [&](const DenoiseStep& args) { check_launch(denoise_step_cuda(args, here.stream), "denoise_step"); });
  if (narrow) torch::stable::copy_(net_in, next);
}
#endif

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("denoise_step", TORCH_BOX(&fastdiff::denoise_step_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("denoise_step", TORCH_BOX(&fastdiff::denoise_step_on_cuda)); }
#endif

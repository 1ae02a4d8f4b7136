#include "cpu/schedule_coefficients.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

Tensor schedule_coefficients_cpu(const Tensor& t, std::optional<Tensor> table, int64_t law, int64_t target, double p0,
                                 double p1, double sigma_data, double shift, double time_scale, bool raw, bool slopes,
                                 ScalarType dtype) {
  STD_TORCH_CHECK(law >= 0 && law < int64_t(Law::count), "law: ", law, " is not known");
  STD_TORCH_CHECK(target >= 0 && target < int64_t(Target::count), "target: ", target, " is not known");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "dtype: expected float32 or float64");
  dtype_of(t.scalar_type(), "t");
  ScheduleCoefficients a{};
  std::optional<Tensor> logs;
  if (Law(law) == Law::table) {
    STD_TORCH_CHECK(table && table->dim() == 1 && table->size(0) >= 2, "table: law TABLE takes float64 [T], T >= 2");
    const int64_t length[] = {table->size(0)};
    logs = parameter(*table, ScalarType::Double, Shape(length, 1), "table");
    a.table = static_cast<const double*>(logs->data_ptr()), a.length = length[0];
  }
  const Tensor times = parameter(t, ScalarType::Double, t.sizes(), "t");
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.push_back(kCoefficients);
  Tensor out = torch::stable::new_empty(t, shape, dtype);
  a.t = static_cast<const double*>(times.data_ptr()), a.n = t.numel();
  a.law = Law(law), a.target = Target(target), a.p0 = p0, a.p1 = p1;
  a.sigma_data = sigma_data, a.shift = shift, a.time_scale = time_scale, a.raw = raw, a.slopes = slopes;
  a.out = out.data_ptr(), a.dtype = dtype_of(dtype, "dtype");
  schedule_coefficients(a);
  return out;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("schedule_coefficients", TORCH_BOX(&fastdiff::schedule_coefficients_cpu));
}

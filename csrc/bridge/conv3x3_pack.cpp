#include "cpu/conv3x3_pack.h"

#include <array>
#include <string>

#include "bridge/bridge.h"
#include "cpu/conv3x3.h"

namespace fastdiff {
namespace {

// What is no kernel's: packed once, by tensor operations.
Tensor composed(const Tensor& weight, const std::string& algorithm, bool transposed) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(weight), from(algorithm), from(transposed)};
  const auto failed = torch_call_dispatcher("fastdiff::conv3x3_pack_composed", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(!failed, "conv3x3_pack: its composition of other ops failed");
  return to<Tensor>(stack[0]);
}

Tensor conv3x3_pack_cpu(const Tensor& weight, std::string algorithm, bool transposed) {
  const bool lean = algorithm == "winograd4_lean";
  if ((!lean && algorithm != "winograd6") || weight.scalar_type() != ScalarType::Float)
    return composed(weight, algorithm, transposed);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "weight: expected [O, I, 3, 3]");
  const auto* data = static_cast<const float*>(weight.data_ptr());
  const auto by = weight.strides();
  Filters f{data, weight.size(0), weight.size(1), by[0], by[1], by[2], by[3], lean ? 0.5 : 1.0};
  if (transposed) {
    f.data += 2 * (f.by_row + f.by_column);
    std::swap(f.o, f.i), std::swap(f.by_o, f.by_i);
    f.by_row = -f.by_row, f.by_column = -f.by_column;
  }
  const int64_t shape[] = {lean ? 9 : 1, lean ? f.i : 9 * f.i, (f.o + kUnit - 1) / kUnit * kUnit};
  Tensor packed = torch::stable::new_empty(weight, Shape(shape, 3));
  conv3x3_pack(f, static_cast<float*>(packed.data_ptr()));
  return packed;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("conv3x3_pack", TORCH_BOX(&fastdiff::conv3x3_pack_cpu)); }

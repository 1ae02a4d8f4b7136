#include "cpu/conv1x1.h"

#include <array>

#include "bridge/channels_last.h"
#include "cpu/conv3x3.h"

namespace fastdiff {
namespace {

// What is no kernel's: PyTorch's product.
Tensor composed(const Tensor& x, const Tensor& packed, const Tensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(packed), from(bias)};
  const auto failed = torch_call_dispatcher("fastdiff::conv1x1_composed", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(!failed, "conv1x1: its composition of other ops failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor conv1x1_cpu(const Tensor& x_, const Tensor& packed, const Tensor& bias) {
  if (x_.scalar_type() != ScalarType::Float || x_.numel() == 0) return composed(x_, packed, bias);
  STD_TORCH_CHECK(x_.dim() == 4 && packed.dim() == 2 && bias.dim() == 1 && packed.size(0) == x_.size(1) &&
                  packed.size(1) == bias.size(0), "packed: expected [I, O] with x [N, I, H, W] and bias [O]");
  STD_TORCH_CHECK(bias.size(0) % kUnit == 0, "packed: ", bias.size(0), " output channels are no multiple of ", kUnit);
  const auto f32 = ScalarType::Float;
  for (const Tensor& t : {packed, bias})
    STD_TORCH_CHECK(t.scalar_type() == f32 && t.is_contiguous(), "packed, bias: expected contiguous float32");
  check_cpu(packed, "packed"), check_cpu(bias, "bias");
  Conv1x1 a{};
  const Tensor x = channels_last(x_, "x", a.x);
  a.n = x.size(0), a.s = spatial(x), a.i = x.size(1), a.o = bias.size(0);
  a.packed = static_cast<const float*>(packed.data_ptr()), a.bias = static_cast<const float*>(bias.data_ptr());
  const Tensor y = new_channels_last(x, a.n, a.o, x.size(2), x.size(3));
  a.y = *try_view(y, "y");
  conv1x1(a);
  return y;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("conv1x1", TORCH_BOX(&fastdiff::conv1x1_cpu)); }

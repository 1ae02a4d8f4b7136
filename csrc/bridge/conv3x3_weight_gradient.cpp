#include "cpu/conv3x3_weight_gradient.h"

#include <array>

#include "bridge/channels_last.h"

namespace fastdiff {
namespace {

// What is no kernel's: PyTorch's.
Tensor composed(const Tensor& dy, const Tensor& h) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(dy), from(h)};
  const auto failed = torch_call_dispatcher("fastdiff::conv3x3_weight_gradient_composed", "", stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(!failed, "conv3x3_weight_gradient: its composition of other ops failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor conv3x3_weight_gradient_cpu(const Tensor& dy_, const Tensor& h_) {
  STD_TORCH_CHECK(dy_.dim() == 4 && h_.dim() == 4 && dy_.size(0) == h_.size(0) && dy_.size(2) == h_.size(2) &&
                  dy_.size(3) == h_.size(3) && dy_.scalar_type() == h_.scalar_type(),
                  "dy: expected [N, O, H, W] with the N, H, W and type of h");
  if (h_.scalar_type() == ScalarType::Double || h_.numel() == 0 || dy_.numel() == 0) return composed(dy_, h_);
  Conv3x3 a{};
  const Tensor h = channels_last(h_, "h", a.norm.x), dy = channels_last(dy_, "dy", a.residual);
  a.norm.n = h.size(0), a.norm.c = h.size(1), a.norm.s = spatial(h), a.h = h.size(2), a.w = h.size(3), a.o = dy.size(1);
  const int64_t shape[] = {a.o, 3, 3, a.norm.c};
  const Tensor dw = torch::stable::new_empty(h, Shape(shape, 4), ScalarType::Float);
  conv3x3_weight_gradient(a, static_cast<float*>(dw.data_ptr()));
  return torch::stable::transpose(torch::stable::transpose(dw, 1, 3), 2, 3);
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&fastdiff::conv3x3_weight_gradient_cpu));
}

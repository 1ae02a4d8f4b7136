// What kernels of channels-last images need of tensors that may be laid out otherwise.
#pragma once
#include "bridge/bridge.h"

namespace fastdiff {

// Channels next to each other, pixels one stride apart: all that the kernel takes.
inline bool is_channels_last(const std::optional<View>& v, int64_t c) { return v && (c == 1 || is_rows(*v)); }

// Uninitialised [n, c, h, w] with the channels of a pixel next to each other.
inline Tensor new_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t shape[] = {n, h, w, c};
  const Tensor t = torch::stable::new_empty(like, Shape(shape, 4));
  return torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3);
}

// `t`, or a channels-last copy; kept alive by the caller.
inline Tensor channels_last(const Tensor& t, const char* name, View& view) {
  auto v = try_view(t, name);
  Tensor r = t;
  if (!is_channels_last(v, t.size(1))) {
    r = new_channels_last(t, t.size(0), t.size(1), t.size(2), t.size(3));
    torch::stable::copy_(r, t);
    v = try_view(r, name);
  }
  view = *v;
  return r;
}

}  // namespace fastdiff

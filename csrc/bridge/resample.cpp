#include "cpu/resample.h"

#include "bridge/bridge.h"

namespace fastdiff {
namespace {

constexpr int64_t kLimit = 1 << 16, kFar = int64_t{1} << 40;  // no index overflows below these

Image image_of(const Tensor& t) {
  const auto s = t.strides();
  return {t.data_ptr(), s[0], s[1], s[2], s[3]};
}

Tensor resample_cpu(const Tensor& x_, const Tensor& taps, int64_t up, int64_t down, int64_t p0, int64_t height,
                    int64_t width) {
  check_cpu(x_, "x");
  STD_TORCH_CHECK(x_.dim() == 4, "x: expected [N, C, H, W]");
  STD_TORCH_CHECK(taps.dim() == 1 && taps.size(0) >= 1 && taps.size(0) <= kLimit, "taps: expected [T], 1 <= T <= 65536");
  STD_TORCH_CHECK(up >= 1 && up <= kLimit, "up: ", up, " is not in 1 ... 65536");
  STD_TORCH_CHECK(down >= 1 && down <= kLimit, "down: ", down, " is not in 1 ... 65536");
  STD_TORCH_CHECK(p0 >= -kFar && p0 <= kFar, "p0: ", p0, " is beyond 2^40");
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height <= kFar && width <= kFar, "height, width: not in 0 ... 2^40");
  Resample a{};
  a.dtype = dtype_of(x_.scalar_type(), "x");
  a.n = x_.size(0), a.c = x_.size(1), a.h = x_.size(2), a.w = x_.size(3), a.out_h = height, a.out_w = width;
  a.up = up, a.down = down, a.p0 = p0, a.count = taps.size(0);
  const int64_t count[] = {a.count};
  dtype_of(taps.scalar_type(), "taps");
  const Tensor filter = parameter(taps, accumulate(x_), Shape(count, 1), "taps");
  a.taps = filter.data_ptr();
  a.last = x_.strides()[1] == 1 && x_.strides()[3] != 1;
  const Tensor x = a.last || x_.strides()[3] == 1 ? x_ : as_contiguous(x_);
  const int64_t planes[] = {a.n, a.c, height, width}, pixels[] = {a.n, height, width, a.c}, order[] = {0, 3, 1, 2};
  Tensor y = torch::stable::new_empty(x, a.last ? Shape(pixels, 4) : Shape(planes, 4));
  if (a.last) y = torch::stable::permute(y, Shape(order, 4));
  a.x = image_of(x), a.y = image_of(y);
  if (y.numel() > 0) resample(a);
  return y;
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("resample", TORCH_BOX(&fastdiff::resample_cpu)); }

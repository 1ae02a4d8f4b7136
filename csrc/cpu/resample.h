#pragma once
#include "cpu/common.h"

namespace fastdiff {

// A tensor [n, c, h, w] with its strides in elements.
struct Image {
  void* data;
  int64_t n, c, h, w;
  template <class T> T* at(int64_t in, int64_t ic, int64_t ih) const {
    return static_cast<T*>(data) + in * n + ic * c + ih * h;
  }
};

struct Resample {
  Image x, y;  // neighbours in memory: pixels of a row in both, or, with `last`, channels in both
  bool last;
  Dtype dtype;
  int64_t n, c, h, w, out_h, out_w;
  int64_t up, down, p0, count;
  const void* taps;  // [count], float, or double for double
};
void resample(const Resample& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

struct Embedding {
  const double* t;      // [n]
  const double* freqs;  // [h]
  double scale;
  void* out;  // [n, 2 h], contiguous
  Dtype dtype;
  int64_t n, h;
  bool sin_first;
  bool wide;  // compute in float64
};
void embedding(const Embedding& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

// Parameters are pointers to Acc<T> (float, or double for double), null where absent.
struct GroupNormSilu {
  View x, y, dy, dx;  // [n, c, s]; y in the forward pass, dy and dx in the backward pass
  int64_t n, c, s, groups;
  double eps;
  bool silu, given_stats;
  const void *weight, *bias;         // [c]
  const void *add, *scale, *shift;   // [n, c]
  void* stats;                       // [n, groups, 2]: mean, variance
  void *dweight, *dbias;             // [c]
  void *dadd, *dscale, *dshift;      // [n, c]
};
void group_norm_silu(const GroupNormSilu& a);
void group_norm_silu_backward(const GroupNormSilu& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

// y[n, o, p] = sum_i weight[o, i] x[n, i, p] + bias[o], float, channels next to each other in x and y; o is a multiple of 16.
// packed: blocks of 64 output channels, the last one of what is left, [i, block] each.
struct Conv1x1 {
  View x, y;
  int64_t n, s, i, o;
  const float *packed, *bias;
};
void conv1x1(const Conv1x1& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

struct Filters {
  const float* data;           // of filter (0, 0), its first value
  int64_t o, i;                // output and input channels
  int64_t by_o, by_i;          // strides, in elements
  int64_t by_row, by_column;   // negative where filters are turned by half a turn
  double unit;                 // of a filter's last value in each dimension, and of the middle one its root
};

// The filters, scaled, in blocks of kUnit output channels: [blocks][i][9][kUnit], 0 beyond o: what "winograd4_lean" and
// "winograd6" read.
void conv3x3_pack(const Filters& f, float* out);

}  // namespace fastdiff

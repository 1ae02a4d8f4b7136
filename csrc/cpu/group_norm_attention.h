#pragma once
#include "cpu/group_norm_silu.h"

namespace fastdiff {

// A is float, or double for double. Weights are rows of A, or of bfloat16 where takes_bfloat16() says so.
struct GroupNormAttention {
  GroupNormSilu norm;  // x, y, sizes, statistics and the affine map; no add, scale, shift
  int64_t heads, d;    // inner width E = heads d
  double scale, out_scale;
  const void *qkv_weight, *qkv_bias;  // [3 E, c], A [3 E] or null
  const void *out_weight, *out_bias;  // [c, E], A [c] or null
};
void group_norm_attention(const GroupNormAttention& a);

// True where the products take bfloat16 operands (two multiplies a lane and instruction) and sum them in float.
bool takes_bfloat16(Dtype x, int64_t c, int64_t d);

}  // namespace fastdiff

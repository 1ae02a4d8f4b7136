#pragma once
#include "cpu/group_norm_silu.h"

namespace fastdiff {

// float32 F(4x4, 3x3) with transformed weights, or with the filters themselves; with tiles of 6x6 beside them; of 16-bit
// integers; bfloat16 F(2x2, 3x3).
enum class Winograd { f4, f4_lean, f6, f4_int16, f2 };

// Channels-last throughout: x, y and residual have channels next to each other and pixels x.s, y.s, residual.s apart.
// Parameters are float, null where absent. Packed weights: fastdiff/ops/conv3x3.py says how.
struct Conv3x3 {
  GroupNormSilu norm;  // x, n, c, s; without norm.weight x is taken as it is. norm.stats is written unless given_stats
  int64_t h, w, o;
  View y, residual;    // [n, o, h w]
  const float* bias;   // [o], or [n, o] with bias_n = o
  int64_t bias_n;
  float out_scale;
  int64_t stats_groups;  // of y; 0: none
  float* stats;          // [n, stats_groups, 2]
  const void* packed;
};
void conv3x3(const Conv3x3& a, Winograd algorithm);
void conv3x3_nested(const Conv3x3& a);  // f6: float32 x, AVX-512

constexpr int64_t kUnit = 16;  // output channels that packed weights are padded to

// Memory of the calling thread that is kept for its next call. Two of them, for two purposes at once.
char* kept_memory(int which, int64_t bytes);

}  // namespace fastdiff

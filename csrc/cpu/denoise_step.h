#pragma once
#include "cpu/common.h"

namespace fastdiff {

// Columns of the tables, as the enums C and K of fastdiff/ops/denoise_step.py.
namespace column {
enum : int { kSkip, kOut, kX, kSaved, kD, kDClip, kH0, kN1 = kH0 + 4, kN2, kNextIn, kNoise, kCount };
}
namespace code {
enum : int { kDraw1, kDraw2, kSaveX, kSaveD, kSaveClipped, kCount };
}
constexpr int kHistory = 4;  // most slots that one row can read

struct DenoiseStep {
  View x, f, saved, net_in;  // [n, c, s]; f and saved may be absent
  View history;              // slot 0
  int64_t slots, slot_stride;
  int64_t n, c, s;
  const int64_t* seeds;      // [n]
  const void* coefficients;  // [rows, column::kCount], x's dtype
  const int32_t* codes;      // [rows, code::kCount]
  const int64_t* row;        // [1] or [n], all within the tables
  bool row_per_sample;
};
void denoise_step(const DenoiseStep& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

// Columns of the tables, as the enums C and K of fastdiff/ops/denoise_step.py.
namespace column {
enum : int {
  kSkip, kOut, kX, kSaved, kD, kDClip, kH0, kN1 = kH0 + 4, kN2, kNextIn, kNoise, kGuide, kNV, kLogMin, kLogMax, kCount
};
}
namespace code {
enum : int { kDraw1, kDraw2, kSaveX, kSaveD, kSaveClipped, kCount };
}
constexpr int kHistory = 4;  // most slots that one row can read

struct DenoiseStep {
  View x, saved;             // [n, c, s], float or double; all but x and net_in may be absent
  View f, f_u, v;            // [n, c, s]
  View net_in;               // [copies n, c, s]
  View history;              // slot 0
  int64_t slots, slot_stride, copies;
  int64_t n, c, s, rows;
  const int64_t* seeds;      // [n]
  const void* coefficients;  // [rows, column::kCount], x's dtype
  const int32_t* codes;      // [rows, code::kCount]
  const int64_t* row;        // [1] or [n], all within the tables
  const void* guidance;      // [1] or [n], x's dtype, with f_u
  bool row_per_sample, guidance_per_sample;
};
void denoise_step(const DenoiseStep& a);

}  // namespace fastdiff

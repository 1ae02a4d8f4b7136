#pragma once
#include "cpu/common.h"

namespace fastdiff {

// Columns and codes, as the enums L and Norms of fastdiff/ops/langevin_step.py.
namespace langevin {
enum : int { kScoreX, kScoreF, kStep, kNextIn, kNoise, kColumns };
enum : int64_t { kSample, kBatch, kGiven, kNorms };
}

struct LangevinStep {
  View x, f, net_in, mean;  // [n, c, s]; mean may be absent
  int64_t n, c, s;
  const int64_t* seeds;      // [n]
  const void* coefficients;  // [rows, langevin::kColumns], x's dtype
  const int32_t* draws;      // [rows]
  const int64_t* row;        // [1] or [n], all within the tables
  bool row_per_sample;
  int64_t norms;
};
void langevin_step(const LangevinStep& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

struct AddNoise {
  View x0;                   // [n, c, s]
  void* out;                 // [k, n, c, s] contiguous, x0's dtype
  const int64_t* seeds;      // [n]
  const void* coefficients;  // [n, k, 2], float (double for double)
  int64_t n, c, s, k, draw, domain;
};
void add_noise(const AddNoise& a);

}  // namespace fastdiff

#pragma once
#include "cpu/common.h"

namespace fastdiff {

struct PhiloxNormal {
  void* out;             // [batch, size]
  Dtype dtype;
  const int64_t* seeds;  // [batch]
  int64_t draw, domain, batch, size;
};
void philox_normal(const PhiloxNormal& a);

}  // namespace fastdiff

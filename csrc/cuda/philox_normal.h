#pragma once
#include "cpu/philox_normal.h"

namespace fastdiff {

// Queues the kernel on `stream`; returns an error's text, or null. The tensors' device must be current.
const char* philox_normal_cuda(const PhiloxNormal& a, void* stream);

}  // namespace fastdiff

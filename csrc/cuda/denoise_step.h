#pragma once
#include "cpu/denoise_step.h"

namespace fastdiff {

// Queues the kernel on `stream`; returns an error's text, or null. The tensors' device must be current; the tables are read
// on it. F, F_u, V and net_in share one type, double where x is. A row outside the tables makes x' NaN.
const char* denoise_step_cuda(const DenoiseStep& a, void* stream);

}  // namespace fastdiff

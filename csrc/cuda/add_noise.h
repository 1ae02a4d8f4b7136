#pragma once
#include "cpu/add_noise.h"

namespace fastdiff {

// Queues the kernel on `stream`; returns an error's text, or null. The tensors' device must be current.
const char* add_noise_cuda(const AddNoise& a, void* stream);

}  // namespace fastdiff

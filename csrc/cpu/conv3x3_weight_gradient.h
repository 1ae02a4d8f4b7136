#pragma once
#include "cpu/conv3x3.h"

namespace fastdiff {

// dw [o, 3, 3, c], float: the gradient of a convolution's weights. Of `a` it reads norm.{x, n, c}, h, w, o, and `residual`,
// which is dy; both channels-last and of one type.
void conv3x3_weight_gradient(const Conv3x3& a, float* dw);

}  // namespace fastdiff

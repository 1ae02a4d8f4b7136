// conv3x3_pack for "winograd4_lean", whose weights are packed anew at every step of training, and "winograd6": a
// transposition, bound by memory. Layout and scale: fastdiff/ops/_winograd.py.
#include "cpu/conv3x3_pack.h"

#include <algorithm>
#include <cmath>

#include "cpu/conv3x3.h"

namespace fastdiff {
namespace {

constexpr int64_t kLine = 16;  // input channels read together: a cache line of channels-last weights

// Input channels i ... i + n of one tap, `real` output channels that exist, times two factors, rounded once.
void pack_some(const Filters& f, const float* from, int64_t n, int64_t real, double row, double column, float* to) {
  for (int64_t i = 0; i < n; ++i) std::fill(to + i * 9 * kUnit + real, to + i * 9 * kUnit + kUnit, 0.0f);
  for (int64_t o = 0; o < real; ++o)
    for (int64_t i = 0; i < n; ++i)
      to[i * 9 * kUnit + o] = static_cast<float>(row * static_cast<double>(from[o * f.by_o + i * f.by_i]) * column);
}

}  // namespace

void conv3x3_pack(const Filters& f, float* out) {
  const double scale[] = {1, std::sqrt(f.unit), f.unit};
  const int64_t blocks = (f.o + kUnit - 1) / kUnit, lines = (f.i + kLine - 1) / kLine;
  parallel_for(blocks * lines, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / lines * kUnit, i = task % lines * kLine;
      const int64_t real = std::min(kUnit, f.o - first), n = std::min(kLine, f.i - i);
      float* to = out + (first * f.i + i * kUnit) * 9;
      const float* from = f.data + first * f.by_o + i * f.by_i;
      for (int64_t r = 0; r < 3; ++r)
        for (int64_t c = 0; c < 3; ++c)
          pack_some(f, from + r * f.by_row + c * f.by_column, n, real, scale[r], scale[c], to + (3 * r + c) * kUnit);
    }
  });
}

}  // namespace fastdiff

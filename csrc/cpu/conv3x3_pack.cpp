// conv3x3_pack for "winograd4_lean", whose weights are packed anew at every step of training: a transposition, bound by
// memory. Layout: fastdiff/ops/conv3x3.py.
#include "cpu/conv3x3_pack.h"

#include <algorithm>

#include "cpu/conv3x3.h"

namespace fastdiff {
namespace {

constexpr int64_t kLine = 16;  // input channels read together: a cache line of channels-last weights

// Input channels i ... i + n of one tap, `width` output channels wide, of which the first `real` exist.
void pack_some(const Filters& f, const float* from, int64_t n, int64_t real, int64_t width, float* to) {
  const int64_t step = 9 * width;  // from one input channel to the next
  if (f.by_o == 1) {
    for (int64_t i = 0; i < n; ++i) std::copy_n(from + i * f.by_i, real, to + i * step);
  } else {
    for (int64_t o = 0; o < real; ++o)
      for (int64_t i = 0; i < n; ++i) to[i * step + o] = from[o * f.by_o + i * f.by_i];
  }
  for (int64_t i = 0; i < n && real < width; ++i) std::fill(to + i * step + real, to + i * step + width, 0.0f);
}

}  // namespace

void conv3x3_pack(const Filters& f, float* out) {
  const int64_t padded = (f.o + kUnit - 1) / kUnit * kUnit, blocks = (f.o + kBlock - 1) / kBlock;
  const int64_t lines = (f.i + kLine - 1) / kLine;
  parallel_for(blocks * lines, 4, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / lines * kBlock, i = task % lines * kLine, width = std::min(kBlock, padded - first);
      const int64_t real = std::min(width, f.o - first), n = std::min(kLine, f.i - i);
      float* to = out + (first * f.i + i * width) * 9;
      const float* from = f.data + first * f.by_o + i * f.by_i;
      for (int64_t tap = 0; tap < 9; ++tap)
        pack_some(f, from + tap / 3 * f.by_row + tap % 3 * f.by_column, n, real, width, to + tap * width);
    }
  });
}

}  // namespace fastdiff

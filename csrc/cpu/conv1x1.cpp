// conv1x1: rows of pixels times a panel of packed weights, as the products behind Winograd's transforms, with x and y where
// they lie. A result is one sum in the order of the channels, whatever the batch and the threads.
#ifndef FASTDIFF_ISA

#include "cpu/conv1x1.h"

#include "cpu/conv3x3.h"
#define FASTDIFF_KERNELS "cpu/conv1x1.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void conv1x1(const Conv1x1& a) {
#define FASTDIFF_ARGUMENTS a
  FASTDIFF_DISPATCH(conv1x1, FASTDIFF_ARGUMENTS);
}
}  // namespace fastdiff

#else

#include "cpu/conv3x3_product.h"

constexpr int64_t kPixels = 96;  // of a task: what it reads of x stays in L2

// `rows` pixels from x on, output channels first_o ... of a block.
inline void multiply_block(const Conv1x1& a, const float* x, float* y, int64_t rows, int64_t first_o) {
  const int64_t block = least(Floats::kBlock, a.o - first_o), wide = Floats::kVectors * W, runs = parts(rows, Floats::kRows);
  const float* panel = a.packed + a.i * first_o;
  for (int64_t k = 0, depth; k < a.i; k += depth, panel += depth * block) {
    depth = least(kDepth, a.i - k);
    const float* ahead = panel + depth * block;
    const int64_t stride = least(parts(block, runs * parts(block, wide)), kLine);
    for (int64_t o = 0; o < block; o += wide)
      for (int64_t i = 0; i < runs; ++i, ahead += depth * stride) {
        const int64_t r = i * rows / runs, count = (i + 1) * rows / runs - r;
        float* to = y + r * a.y.s + first_o + o;
        const int vectors = static_cast<int>(least(Floats::kVectors, (block - o) / W));
        multiply_of<Floats>(static_cast<int>(count), vectors)(x + r * a.x.s + k, a.x.s, panel + o, block, depth,
                                                              k ? to : a.bias + first_o + o, k ? a.y.s : 0, to, a.y.s, nullptr,
                                                              ahead, stride);
      }
  }
}

inline void conv1x1(const Conv1x1& a) {
  const int64_t blocks = parts(a.o, Floats::kBlock), cuts = parts(a.s, kPixels);
  parallel_for(a.n * cuts * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks / cuts, cut = task / blocks % cuts, first = cut * a.s / cuts;
      const auto* x = a.x.at<const float>(n, 0, first);
      auto* y = a.y.at<float>(n, 0, first);
      multiply_block(a, x, y, (cut + 1) * a.s / cuts - first, task % blocks * Floats::kBlock);
    }
  });
}

#endif

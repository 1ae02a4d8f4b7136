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

// y [R rows, J vectors] = from + x [R, words] u [words, J vectors]; rows of `from` are the bias, or y itself. Touches what
// lies from `ahead` on for L2, ahead_stride floats further at each word.
template <int R, int J>
__attribute__((noinline)) void multiply_rows(const float* x, int64_t x_stride, const float* u, int64_t u_stride,
                                             int64_t words, const float* from, int64_t from_stride, float* y,
                                             int64_t y_stride, const float* ahead, int64_t ahead_stride) {
  vf sum[R][J];
  each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) { sum[r][j] = load(from + r * from_stride + j * W); });
  });
  for (int64_t k = 0; k < words; ++k, u += u_stride, ahead += ahead_stride) {
    vf b[J];
    each<J>([&](int j) __attribute__((always_inline)) { b[j] = load(u + j * W); });
    __builtin_prefetch(ahead, 0, 2);
    each<R>([&](int r) __attribute__((always_inline)) {
      const vf a = splat<vf>(x[r * x_stride + k]);
      each<J>([&](int j) __attribute__((always_inline)) { sum[r][j] = fma(a, b[j], sum[r][j]); });
    });
  }
  each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) { store(y + r * y_stride + j * W, sum[r][j]); });
  });
}

typedef void (*MultiplyRows)(const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t,
                             const float*, int64_t);

// The kernels by vectors and rows, both from 1 on.
template <int... i> constexpr auto row_kernels(std::integer_sequence<int, i...>) {
  struct { MultiplyRows at[sizeof...(i)]; } table{{&multiply_rows<i % Floats::kRows + 1, i / Floats::kRows + 1>...}};
  return table;
}
inline MultiplyRows multiply_rows_of(int64_t rows, int64_t vectors) {
  static constexpr auto table = row_kernels(std::make_integer_sequence<int, Floats::kRows * Floats::kVectors>{});
  return table.at[(vectors - 1) * Floats::kRows + rows - 1];
}

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
        multiply_rows_of(count, least(Floats::kVectors, (block - o) / W))(
            x + r * a.x.s + k, a.x.s, panel + o, block, depth, k ? to : a.bias + first_o + o, k ? a.y.s : 0, to, a.y.s, ahead,
            stride);
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

// resample: FIR resampling, down the columns and then along the rows. Formula: fastdiff/ops/resample.py.
#ifndef FASTDIFF_ISA

#include "cpu/resample.h"
#define FASTDIFF_KERNELS "cpu/resample.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void resample(const Resample& a) { FASTDIFF_DISPATCH(resample, a); }
}  // namespace fastdiff

#else

// The taps that meet an element: y[o] = sum_j taps[tap + j up] x[index - j], j = 0 ... count - 1.
struct Hits {
  int64_t index, tap, count;
  FD_INLINE bool operator==(const Hits& b) const { return index == b.index && tap == b.tap && count == b.count; }
};
FD_INLINE Hits unclipped(const Resample& a, int64_t o) {
  const int64_t at = a.down * o + a.count - 1 - a.p0;
  const int64_t tap = (at % a.up + a.up) % a.up;
  return {(at - tap) / a.up, tap, tap < a.count ? (a.count - tap + a.up - 1) / a.up : 0};
}
// Without those that meet nothing: 0 <= index - j < length.
FD_INLINE Hits hits_of(const Resample& a, int64_t o, int64_t length) {
  Hits h = unclipped(a, o);
  const int64_t first = h.index >= length ? h.index - length + 1 : 0;
  const int64_t end = h.index + 1 < h.count ? h.index + 1 : h.count;
  return first < end ? Hits{h.index - first, h.tap + first * a.up, end - first} : Hits{0, 0, 0};
}

// y[i] = sum_j taps[j up] x[i - j step], i < n. K > 0: the number of taps.
template <int K, class In, class Out>
FD_INLINE void weigh(const In* x, int64_t step, const Acc<Out>* taps, int64_t up, int64_t count, int64_t n, Out* y) {
  typedef Vec<Acc<Out>> V;
  constexpr int N = Simd<Acc<Out>>::N;
  const int64_t taken = K > 0 ? K : count;
  V gain[K > 0 ? K : 1];
  if constexpr (K > 0)
    for (int j = 0; j < K; ++j) gain[j] = splat<V>(taps[j * up]);
  const auto total = [&](auto read) __attribute__((always_inline)) {
    V s = read(x) * (K > 0 ? gain[0] : splat<V>(taps[0]));
    for (int64_t j = 1; j < taken; ++j) s = fma(read(x - j * step), K > 0 ? gain[K > 0 ? j : 0] : splat<V>(taps[j * up]), s);
    return s;
  };
  int64_t i = 0;
  for (; i + N <= n; i += N) store(y + i, total([&](const In* p) __attribute__((always_inline)) { return load(p + i); }));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_some(y + i, total([&](const In* p) __attribute__((always_inline)) { return load_some(p + i, rest); }), rest);
  }
}
template <class In, class Out>
void weighed(const Resample& a, const In* x, int64_t step, const Hits& h, int64_t n, Out* y) {
  const auto* taps = static_cast<const Acc<Out>*>(a.taps) + h.tap;
  switch (h.count) {
    case 0: std::memset(static_cast<void*>(y), 0, n * sizeof(Out)); return;
    case 1: return weigh<1>(x, step, taps, a.up, 1, n, y);
    case 2: return weigh<2>(x, step, taps, a.up, 2, n, y);
    case 3: return weigh<3>(x, step, taps, a.up, 3, n, y);
    case 4: return weigh<4>(x, step, taps, a.up, 4, n, y);
    default: return weigh<0>(x, step, taps, a.up, h.count, n, y);
  }
}

// ---- channels-last: every pixel is a run of channels

template <class T> void rows_last(const Resample& a) {
  typedef Acc<T> A;
  parallel_for(a.n * a.out_h, 16384 / (a.out_w * a.c + 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch memory(a.w * a.c * sizeof(A) + 64);
    A* column = reinterpret_cast<A*>(memory.data);  // [w, c]: a row of x, weighed down the columns
    Hits before{-1, -1, -1};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / a.out_h, row = task % a.out_h;
      const Hits vertical = hits_of(a, row, a.h);
      T* y = a.y.at<T>(n, 0, row);
      if (row > 0 && task > begin && vertical == before) {  // nearest neighbour
        std::memcpy(static_cast<void*>(y), y - a.y.h, a.out_w * a.c * sizeof(T));
        continue;
      }
      before = vertical;
      const T* x = a.x.at<const T>(n, 0, vertical.index);
      if (a.x.w == a.c) weighed(a, x, a.x.h, vertical, a.w * a.c, column);
      else
        for (int64_t i = 0; i < a.w; ++i) weighed(a, x + i * a.x.w, a.x.h, vertical, a.c, column + i * a.c);
      for (int64_t o = 0; o < a.out_w; ++o) {
        const Hits h = hits_of(a, o, a.w);
        weighed<A, T>(a, column + h.index * a.c, a.c, h, a.c, y + o * a.c);
      }
    }
  });
}

// ---- contiguous rows

template <class A> FD_INLINE A value_at(const Resample& a, const A* x, int64_t o) {
  const Hits h = hits_of(a, o, a.w);
  const A* taps = static_cast<const A*>(a.taps) + h.tap;
  A s = 0;
  for (int64_t j = 0; j < h.count; ++j) s += taps[j * a.up] * x[h.index - j];
  return s;
}

FD_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// One row, `up` results at a time that meet K taps each; loops of constant strides, which the compiler vectorises.
template <int UP, int DOWN, int K, class A> void filter_row(const Resample& a, const A* __restrict x, A* __restrict y) {
  A gain[UP][K];
  int64_t index[UP], first = 0, end = a.out_w / UP;
  for (int r = 0; r < UP; ++r) {
    const Hits h = unclipped(a, r);
    index[r] = h.index;
    for (int j = 0; j < K; ++j) gain[r][j] = static_cast<const A*>(a.taps)[h.tap + j * UP];
    const int64_t lowest = -floor_div(h.index - K + 1, DOWN), highest = floor_div(a.w - 1 - h.index, DOWN);
    if (lowest > first) first = lowest;
    if (highest + 1 < end) end = highest + 1;
  }
  if (end < first) end = first = 0;
  for (int64_t o = 0; o < first * UP; ++o) y[o] = value_at(a, x, o);
  for (int64_t q = first; q < end; ++q)
    for (int r = 0; r < UP; ++r) {
      A s = gain[r][0] * x[q * DOWN + index[r]];
      for (int j = 1; j < K; ++j) s += gain[r][j] * x[q * DOWN + index[r] - j];
      y[q * UP + r] = s;
    }
  for (int64_t o = end * UP; o < a.out_w; ++o) y[o] = value_at(a, x, o);
}
template <class A> void general_row(const Resample& a, const A* x, A* y) {
  for (int64_t o = 0; o < a.out_w; ++o) y[o] = value_at(a, x, o);
}
template <class A> auto row_filter(const Resample& a) -> void (*)(const Resample&, const A*, A*) {
  const int64_t up = a.up, down = a.down, taps = a.count;
  if (up == 2 && down == 1 && taps == 2) return filter_row<2, 1, 1, A>;
  if (up == 2 && down == 1 && taps == 4) return filter_row<2, 1, 2, A>;
  if (up == 1 && down == 2 && taps == 2) return filter_row<1, 2, 2, A>;
  if (up == 1 && down == 2 && taps == 4) return filter_row<1, 2, 4, A>;
  if (up == 1 && down == 1 && taps == 4) return filter_row<1, 1, 4, A>;
  return general_row<A>;
}

template <class T> void rows(const Resample& a) {
  typedef Acc<T> A;
  const auto filter = row_filter<A>(a);
  parallel_for(a.n * a.c * a.out_h, 16384 / (a.out_w + 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch memory((a.w + a.out_w) * sizeof(A) + 64);
    A *column = reinterpret_cast<A*>(memory.data), *line = column + a.w;
    Hits before{-1, -1, -1};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / a.out_h, row = task % a.out_h;
      const Hits vertical = hits_of(a, row, a.h);
      T* y = a.y.at<T>(plane / a.c, plane % a.c, row);
      if (row > 0 && task > begin && vertical == before) {
        std::memcpy(static_cast<void*>(y), y - a.y.h, a.out_w * sizeof(T));
        continue;
      }
      before = vertical;
      weighed(a, a.x.at<const T>(plane / a.c, plane % a.c, vertical.index), a.x.h, vertical, a.w, column);
      if constexpr (std::is_same_v<T, A>) {
        filter(a, column, y);
      } else {
        filter(a, column, line);
        const A one = 1;
        weigh<1>(line, 0, &one, 0, 1, a.out_w, y);
      }
    }
  });
}

template <class T> void run_resample(const Resample& a) { a.last ? rows_last<T>(a) : rows<T>(a); }

inline void resample(const Resample& a) {
  with_dtype(a.dtype, [&](auto t) { run_resample<decltype(t)>(a); });
}

#endif

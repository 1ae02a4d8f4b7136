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
// Those of every o, without the ones that meet nothing: 0 <= index - j < length.
inline void fill(const Resample& a, int64_t length, int64_t size, Hits* table) {
  for (int64_t o = 0; o < size; ++o) {
    const Hits h = unclipped(a, o);
    const int64_t first = h.index >= length ? h.index - length + 1 : 0;
    const int64_t end = h.index + 1 < h.count ? h.index + 1 : h.count;
    table[o] = first < end ? Hits{h.index - first, h.tap + first * a.up, end - first} : Hits{0, 0, 0};
  }
}
struct Tables {
  Hits *rows, *columns;  // [out_h], [out_w]
};

// y[i] = sum_j gain_j x_j[i], i < n, where term(j) says x_j and gain_j. K > 0: the number of terms.
template <class In, class A> struct Term { const In* x; A gain; };
template <int K, class In, class Out, class F> FD_INLINE void weigh(const F& term, int64_t count, int64_t n, Out* y) {
  typedef Vec<Acc<Out>> V;
  constexpr int N = Simd<Acc<Out>>::N, kept = K > 0 ? K : 1;
  const In* x[kept];
  V gain[kept];
  for (int j = 0; j < kept; ++j) x[j] = term(j).x, gain[j] = splat<V>(term(j).gain);
  const auto total = [&](auto read) __attribute__((always_inline)) {
    V s = read(x[0]) * gain[0];
    for (int j = 1; j < K; ++j) s = fma(read(x[j]), gain[j], s);
    if constexpr (K == 0)
      for (int64_t j = 1; j < count; ++j) s = fma(read(term(j).x), splat<V>(term(j).gain), s);
    return s;
  };
  int64_t i = 0;
  for (; i + N <= n; i += N) store(y + i, total([&](const In* p) __attribute__((always_inline)) { return load(p + i); }));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_some(y + i, total([&](const In* p) __attribute__((always_inline)) { return load_some(p + i, rest); }), rest);
  }
}
template <class In, class Out, class F> void weighed(const F& term, int64_t count, int64_t n, Out* y) {
  switch (count) {
    case 0: std::memset(static_cast<void*>(y), 0, n * sizeof(Out)); return;
    case 1:
      if constexpr (std::is_same_v<In, Out>)
        if (term(0).gain == 1) return static_cast<void>(std::memcpy(static_cast<void*>(y), term(0).x, n * sizeof(Out)));
      return weigh<1, In>(term, 1, n, y);
    case 2: return weigh<2, In>(term, 2, n, y);
    case 3: return weigh<3, In>(term, 3, n, y);
    case 4: return weigh<4, In>(term, 4, n, y);
    default: return weigh<0, In>(term, count, n, y);
  }
}
// The taps of `h` over x, x - step, ...
template <class In, class Out> void along(const Resample& a, const Hits& h, const In* x, int64_t step, int64_t n, Out* y) {
  typedef Acc<Out> A;
  const A* taps = static_cast<const A*>(a.taps) + h.tap;
  weighed<In>([=, up = a.up](int64_t j) { return Term<In, A>{x - j * step, taps[j * up]}; }, h.count, n, y);
}

// ---- channels-last: every pixel is a run of channels

// One pixel from up to four of x, where that is all there are: no row in between is worth its memory traffic.
template <class T> FD_INLINE void pixel_directly(const Resample& a, const Hits& v, const Hits& h, const T* x, T* y) {
  typedef Acc<T> A;
  const A* taps = static_cast<const A*>(a.taps);
  Term<T, A> terms[4];
  int count = 0;
  for (int64_t i = 0; i < v.count; ++i)
    for (int64_t j = 0; j < h.count; ++j)
      terms[count++] = {x - i * a.x.h - j * a.x.w, taps[v.tap + i * a.up] * taps[h.tap + j * a.up]};
  weighed<T>([&](int64_t j) { return terms[j]; }, count, a.c, y);
}

template <class A> FD_INLINE bool is_one(const Resample& a, int64_t tap) { return static_cast<const A*>(a.taps)[tap] == 1; }
template <class T> FD_INLINE bool is_copy(const Resample& a, const Hits& v, const Hits& h) {
  return v.count == 1 && h.count == 1 && is_one<Acc<T>>(a, v.tap) && is_one<Acc<T>>(a, h.tap);
}
// `times` copies of n elements, one after the other, from one reading (nearest neighbour).
template <class T> FD_INLINE void copies(const T* x, int64_t n, int64_t times, T* y) {
  constexpr int64_t N = kBytes / sizeof(T);
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    vf v;
    __builtin_memcpy(&v, x + i, kBytes);
    for (int64_t k = 0; k < times; ++k) __builtin_memcpy(y + k * n + i, &v, kBytes);
  }
  for (int64_t k = 0; i < n && k < times; ++k) std::memcpy(static_cast<void*>(y + k * n + i), x + i, (n - i) * sizeof(T));
}

template <class T> void rows_last(const Resample& a, const Tables& tables) {
  typedef Acc<T> A;
  const int64_t most = (a.count + a.up - 1) / a.up;
  const bool directly = most * most <= 4;
  parallel_for(a.n * a.out_h, 16384 / (a.out_w * a.c + 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch memory(directly ? 64 : a.w * a.c * sizeof(A) + 64);
    A* column = reinterpret_cast<A*>(memory.data);  // [w, c]: a row of x, weighed down the columns
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / a.out_h, row = task % a.out_h;
      const Hits v = tables.rows[row];
      T* y = a.y.at<T>(n, 0, row);
      const T* x = a.x.at<const T>(n, 0, v.index);
      if (directly) {
        for (int64_t o = 0, same = 1; o < a.out_w; o += same, same = 1) {
          const Hits h = tables.columns[o];
          while (o + same < a.out_w && tables.columns[o + same] == h) ++same;
          const T* from = x + h.index * a.x.w;
          if (is_copy<T>(a, v, h)) copies(from, a.c, same, y + o * a.c);
          else
            for (int64_t i = o; i < o + same; ++i) pixel_directly(a, v, h, from, y + i * a.c);
        }
        continue;
      }
      if (a.x.w == a.c) along(a, v, x, a.x.h, a.w * a.c, column);
      else
        for (int64_t i = 0; i < a.w; ++i) along(a, v, x + i * a.x.w, a.x.h, a.c, column + i * a.c);
      for (int64_t o = 0; o < a.out_w; ++o) {
        const Hits h = tables.columns[o];
        along(a, h, static_cast<const A*>(column) + h.index * a.c, a.c, a.c, y + o * a.c);
      }
    }
  });
}

// ---- contiguous rows

typedef int64_t vl FD_VECTOR(kBytes);
FD_INLINE vi lanes_like(vf) { return vi{}; }
FD_INLINE vl lanes_like(vd) { return vl{}; }

// Lanes start, start + step, ... of a followed by b; with `zip`, lanes of a and b in turns.
template <bool zip, class V> FD_INLINE V pick(V a, V b, int start) {
  constexpr int N = sizeof(V) / sizeof(a[0]);
  auto lane = lanes_like(a);
  for (int i = 0; i < N; ++i) lane[i] = zip ? start + i / 2 + i % 2 * N : start + 2 * i;
#if defined(__clang__)
  V r;
  for (int i = 0; i < N; ++i) r[i] = lane[i] < N ? a[lane[i]] : b[lane[i] - N];
  return r;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// A row of y that meets the same taps and pixels as the row before (nearest neighbour) is copied. Not channels-last, where
// copying from y instead of from x looked slower, on a busy machine; bench_resample.py tells.
template <class T>
FD_INLINE bool repeats(const Resample& a, const Hits* rows, int64_t row, bool started, int64_t bytes, T* y) {
  if (!started || row == 0 || !(rows[row] == rows[row - 1])) return false;
  std::memcpy(static_cast<void*>(y), y - a.y.h, bytes);
  return true;
}

constexpr int64_t kMargin = 64;  // zeros on either side of a row, so that no result is at an edge

template <class T> struct RowFilter {
  const Resample& a;
  const Hits* columns;
  Hits phase[2];
  void (*run)(const RowFilter&, const Acc<T>* x, T* y);
};

// A vector of results a phase, from rows with margins.
template <int UP, int DOWN, int K, class T> void filter_row(const RowFilter<T>& f, const Acc<T>* x, T* y) {
  typedef Acc<T> A;
  typedef Vec<A> V;
  constexpr int N = Simd<A>::N;
  V gain[UP][K];
  const A* from[UP];  // the first pixel that the first result meets
  for (int r = 0; r < UP; ++r) {
    from[r] = x + f.phase[r].index - K + 1;
    for (int j = 0; j < K; ++j) gain[r][K - 1 - j] = splat<V>(static_cast<const A*>(f.a.taps)[f.phase[r].tap + j * UP]);
  }
  const auto put = [&](int64_t o, V v) __attribute__((always_inline)) {
    const int64_t left = f.a.out_w - o;
    if (left >= N) store(y + o, v);
    else if (left > 0) store_some(y + o, v, static_cast<int>(left));
  };
  for (int64_t q = 0; q * UP < f.a.out_w; q += N) {
    V s[UP];
    for (int r = 0; r < UP; ++r) {
      const A* p = from[r] + q * DOWN;
      if constexpr (DOWN == 1) {
        s[r] = load(p) * gain[r][0];
        for (int j = 1; j < K; ++j) s[r] = fma(load(p + j), gain[r][j], s[r]);
      } else {
        s[r] = V{};
        for (int j = 0; j < K; j += 2) {
          const V low = load(p + j), high = load(p + j + N);
          s[r] = fma(pick<false>(low, high, 0), gain[r][j], s[r]);
          s[r] = fma(pick<false>(low, high, 1), gain[r][j + 1], s[r]);
        }
      }
    }
    if constexpr (UP == 1) {
      put(q, s[0]);
    } else {
      put(2 * q, pick<true>(s[0], s[1], 0));
      put(2 * q + N, pick<true>(s[0], s[1], N / 2));
    }
  }
}
template <class T> void general_row(const RowFilter<T>& f, const Acc<T>* x, T* y) {
  for (int64_t o = 0; o < f.a.out_w; ++o) {
    const Hits h = f.columns[o];
    const auto* taps = static_cast<const Acc<T>*>(f.a.taps) + h.tap;
    Acc<T> s = 0;
    for (int64_t j = 0; j < h.count; ++j) s += taps[j * f.a.up] * x[h.index - j];
    y[o] = from_float<T>(s);
  }
}

template <class T> RowFilter<T> row_filter(const Resample& a, const Tables& tables) {
  RowFilter<T> f{a, tables.columns, {unclipped(a, 0), unclipped(a, 1)}, general_row<T>};
  // The last vector of results reaches past the row by less than two vectors' pixels.
  const int64_t lowest = unclipped(a, 0).index - a.count, highest = unclipped(a, a.out_w - 1).index + 4 * Simd<Acc<T>>::N;
  if (lowest < -kMargin || highest >= a.w + kMargin + 2 * Simd<Acc<T>>::N) return f;
  const int64_t up = a.up, down = a.down, taps = a.count;
  if (up == 2 && down == 1 && taps == 2) f.run = filter_row<2, 1, 1, T>;
  if (up == 2 && down == 1 && taps == 4) f.run = filter_row<2, 1, 2, T>;
  if (up == 1 && down == 2 && taps == 2) f.run = filter_row<1, 2, 2, T>;
  if (up == 1 && down == 2 && taps == 4) f.run = filter_row<1, 2, 4, T>;
  if (up == 1 && down == 1 && taps == 4) f.run = filter_row<1, 1, 4, T>;
  return f;
}

template <class T> void rows(const Resample& a, const Tables& tables) {
  typedef Acc<T> A;
  const RowFilter<T> filter = row_filter<T>(a, tables);
  const int64_t length = a.w + 2 * kMargin + 4 * Simd<A>::N;
  parallel_for(a.n * a.c * a.out_h, 16384 / (a.out_w + 1) + 1, [&](int64_t begin, int64_t end) {
    const Scratch memory(length * sizeof(A));
    std::memset(memory.data, 0, length * sizeof(A));
    A* column = reinterpret_cast<A*>(memory.data) + kMargin;
    int64_t plane = begin / a.out_h, row = begin % a.out_h;
    for (int64_t task = begin; task < end; ++task) {
      const Hits v = tables.rows[row];
      T* y = a.y.at<T>(plane / a.c, plane % a.c, row);
      if (!repeats(a, tables.rows, row, task > begin, a.out_w * sizeof(T), y)) {
        along(a, v, a.x.at<const T>(plane / a.c, plane % a.c, v.index), a.x.h, a.w, column);
        filter.run(filter, column, y);
      }
      if (++row == a.out_h) row = 0, ++plane;
    }
  });
}

template <class T> void run_resample(const Resample& a, const Tables& t) { a.last ? rows_last<T>(a, t) : rows<T>(a, t); }

inline void resample(const Resample& a) {
  const Scratch memory((a.out_h + a.out_w) * static_cast<int64_t>(sizeof(Hits)));
  Tables tables{reinterpret_cast<Hits*>(memory.data), nullptr};
  tables.columns = tables.rows + a.out_h;
  fill(a, a.h, a.out_h, tables.rows);
  fill(a, a.w, a.out_w, tables.columns);
  with_dtype(a.dtype, [&](auto t) { run_resample<decltype(t)>(a, tables); });
}

#endif

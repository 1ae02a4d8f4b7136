// group_norm_silu: statistics, then one affine map a channel and SiLU. Formula: fastdiff/ops/group_norm_silu.py.
#ifndef FASTDIFF_ISA

#include "cpu/group_norm_silu.h"
#define FASTDIFF_KERNELS "cpu/group_norm_silu.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void group_norm_silu(const GroupNormSilu& a) { FASTDIFF_DISPATCH(group_norm_silu, a); }
}  // namespace fastdiff

#else

#include "cpu/group_norm.h"

// The unit of a channel's map, and the value from what the map gives.
template <class A, bool silu> constexpr double kUnit = silu ? kSiluUnit<A> : 1;
template <class T, bool silu> FD_INLINE Vec<Acc<T>> activate(Vec<Acc<T>> s) {
  if constexpr (silu) return silu_of<T>(s);
  else return s;
}

// y = silu((x - m) A + B) over one run of n elements of a channel.
template <class T, bool silu> FD_INLINE void apply_run(const T* x, T* y, int64_t n, Acc<T> m_, Acc<T> a_, Acc<T> b_) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const V m = splat<V>(m_), a = splat<V>(a_), b = splat<V>(b_);
  int64_t i = 0;
  for (; i + N <= n; i += N) store(y + i, activate<T, silu>(fma(load(x + i) - m, a, b)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_some(y + i, activate<T, silu>(fma(load_some(x + i, rest) - m, a, b)), rest);
  }
}

// Contiguous channels. A task is a group: while it is in cache it is read for its statistics and again for its values.
template <class T, bool silu> void planes(const GroupNormSilu& g) {
  typedef Acc<T> A;
  const int64_t per = g.c / g.groups, size = per * g.s, pieces = g.given_stats ? 0 : (size + kPiece - 1) / kPiece;
  const int64_t table_at = aligned(pieces * sizeof(Moments)), maps_at = table_at + ChannelTable<A>::bytes(per);
  const auto first = [&](char* memory, int64_t task, int64_t piece) {
    const int64_t begin = piece * kPiece, end = begin + kPiece < size ? begin + kPiece : size;
    reinterpret_cast<Moments*>(memory)[piece] = group_moments<T>(g, task / g.groups, task % g.groups * per, begin, end);
  };
  const auto finish = [&](char* memory, int64_t task) {
    A* stats = static_cast<A*>(g.stats) + 2 * task;
    double mean = stats[0], var = stats[1];
    if (!g.given_stats) {
      Moments all;
      for (int64_t i = 0; i < pieces; ++i) all.merge(reinterpret_cast<Moments*>(memory)[i]);
      stats[0] = static_cast<A>(mean = all.mean), stats[1] = static_cast<A>(var = all.variance());
    }
    double *means = reinterpret_cast<double*>(memory + maps_at), *rstds = means + per;
    const double rstd = rstd_of(g, var);
    for (int64_t c = 0; c < per; ++c) means[c] = mean, rstds[c] = rstd;
    channel_maps<A>(g, task / g.groups, task % g.groups * per, per, means, rstds, {memory + table_at, per},
                    kUnit<A, silu>);
  };
  const auto second = [&](char* memory, int64_t task, int64_t begin, int64_t end) {
    const ChannelTable<A> k(memory + table_at, per);
    const int64_t n = task / g.groups, c0 = task % g.groups * per;
    for (int64_t c = begin; c < end; ++c)
      apply_run<T, silu>(g.x.at<const T>(n, c0 + c), g.y.at<T>(n, c0 + c), g.s, k.m[c], k.a[c], k.b[c]);
  };
  run_stages({g.n * g.groups, size, maps_at + 2 * per * 8, pieces, per}, first, finish, second);
}

// Channels-last: pixels begin ... end - 1, in the order of memory, so that the hardware fetches ahead; coefficients are in L1.
template <class T, bool silu>
FD_INLINE void apply_rows(const GroupNormSilu& g, const ChannelTable<Acc<T>>& k, int64_t n, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = g.x.at<const T>(n, 0, r);
    T* y = g.y.at<T>(n, 0, r);
    by_vectors<1, Acc<T>>(0, g.c, [&](auto j, int64_t c) __attribute__((always_inline)) {
      constexpr int J = decltype(j)::value;
      const int some = static_cast<int>(g.c - c);
      const auto of = [&](const auto* p) __attribute__((always_inline)) { return load_at<J>(p + c, 0, some); };
      store_at<J>(y + c, activate<T, silu>(fma(of(x) - of(k.m), of(k.a), of(k.b))), 0, some);
    });
  }
}

// A task is a sample: moments of pieces of pixels and blocks of channels, then groups, then values. (Slices of channels as
// tasks, one parallel region instead of two at batch 1, took 10 to 40 % longer.)
template <class T, bool silu> void rows(const GroupNormSilu& g) {
  typedef Acc<T> A;
  const int64_t pieces = pieces_of(g), table_at = aligned(pieces * 2 * g.c * 8);
  const auto first = [&](char* memory, int64_t n, int64_t item) {
    item_moments<T>(g, n, item, reinterpret_cast<double*>(memory));
  };
  const auto finish = [&](char* memory, int64_t n) {
    double* moments = reinterpret_cast<double*>(memory);
    const ChannelTable<A> table(memory + table_at, g.c);
    if (g.given_stats) return channel_maps<A>(g, n, moments, table, kUnit<A, silu>);
    if (g.s == 0)
      for (int64_t i = 0; i < 2 * g.c; ++i) moments[i] = 0;
    merge_pieces(g, moments, pieces);
    group_statistics<A>(g, n, moments);
    channel_maps<A>(g, n, 0, g.c, moments, moments + g.c, table, kUnit<A, silu>);
  };
  const auto second = [&](char* memory, int64_t n, int64_t begin, int64_t end) {
    apply_rows<T, silu>(g, {memory + table_at, g.c}, n, begin, end);
  };
  const int64_t items = g.given_stats ? 0 : items_of<T>(g);
  run_stages({g.n, g.c * g.s, table_at + ChannelTable<A>::bytes(g.c), items, g.s}, first, finish, second);
}

template <class T> void run_forward(const GroupNormSilu& a) {
  if (a.x.s == 1) a.silu ? planes<T, true>(a) : planes<T, false>(a);
  else a.silu ? rows<T, true>(a) : rows<T, false>(a);
}

inline void group_norm_silu(const GroupNormSilu& a) {
  with_dtype(a.x.dtype, [&](auto t) { run_forward<decltype(t)>(a); });
}

#endif

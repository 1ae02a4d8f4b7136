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

// y = silu((x - m) A + B) over one run of n elements of a channel.
template <class T, bool silu> FD_INLINE void apply_run(const T* x, T* y, int64_t n, const Channel<Acc<T>>& k) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const V m = splat<V>(k.m), a = splat<V>(k.a), b = splat<V>(k.b);
  int64_t i = 0;
  for (; i + N <= n; i += N) store(y + i, activate<silu>(fma(load(x + i) - m, a, b)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_some(y + i, activate<silu>(fma(load_some(x + i, rest) - m, a, b)), rest);
  }
}

// Contiguous channels: a group is read for its statistics and, still in cache, again for its values.
template <class T, bool silu> void planes(const GroupNormSilu& a) {
  typedef Acc<T> A;
  const int64_t per = a.c / a.groups;
  parallel_for(a.n * a.groups, grain_of(per * a.s), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / a.groups, c0 = task % a.groups * per;
      A* stats = static_cast<A*>(a.stats) + 2 * task;
      Moments moments{0, 0, 0};
      if (a.given_stats) {
        moments.mean = stats[0];
      } else {
        moments = group_moments<T>(a, n, c0, per);
        stats[0] = static_cast<A>(moments.mean);
        stats[1] = static_cast<A>(moments.variance());
      }
      const double rstd = rstd_of(a, a.given_stats ? stats[1] : moments.variance());
      for (int64_t c = c0; c < c0 + per; ++c)
        apply_run<T, silu>(a.x.at<const T>(n, c), a.y.at<T>(n, c), a.s, channel_map<A>(a, n, c, moments.mean, rstd));
    }
  });
}

// Channels-last: one row of pixels' channels after the other, three coefficients a channel.
template <class T, bool silu>
FD_INLINE void apply_rows(const GroupNormSilu& a, const ChannelTable<Acc<T>>& k, int64_t n, int64_t begin, int64_t end) {
  constexpr int N = Simd<Acc<T>>::N;
  for (int64_t s = begin; s < end; ++s) {
    const T* x = a.x.at<const T>(n, 0, s);
    T* y = a.y.at<T>(n, 0, s);
    int64_t c = 0;
    for (; c + N <= a.c; c += N)
      store(y + c, activate<silu>(fma(load(x + c) - load(k.m + c), load(k.a + c), load(k.b + c))));
    if (c < a.c) {
      const int rest = static_cast<int>(a.c - c);
      const auto v = fma(load_some(x + c, rest) - load_some(k.m + c, rest), load_some(k.a + c, rest), load_some(k.b + c, rest));
      store_some(y + c, activate<silu>(v), rest);
    }
  }
}

template <class T, bool silu> void rows(const GroupNormSilu& a) {
  typedef Acc<T> A;
  constexpr int64_t block = channel_block<A>();
  const int64_t blocks = (a.c + block - 1) / block, table_at = ChannelSums::bytes(a.c);
  // A sample a thread where there are enough samples (it may still be in cache for the second pass), else a sample after
  // the other by all threads; same sums either way.
  const bool inner = a.n < threads();
  const auto samples = [&](int64_t begin, int64_t end) {
    const Scratch memory(table_at + ChannelTable<A>::bytes(a.c));
    const ChannelSums sums(memory.data, a.c);
    const ChannelTable<A> table(memory.data + table_at, a.c);
    for (int64_t n = begin; n < end; ++n) {
      const auto first = [&](int64_t i, int64_t j) {
        for (; i < j; ++i) channel_moments<T>(a, n, i * block, sums);
      };
      const auto second = [&](int64_t i, int64_t j) { apply_rows<T, silu>(a, table, n, i, j); };
      if (!a.given_stats) inner ? parallel_for(blocks, grain_of(block * a.s), first) : first(0, blocks);
      channel_maps<A>(a, n, sums, table);
      inner ? parallel_for(a.s, grain_of(a.c), second) : second(0, a.s);
    }
  };
  inner ? samples(0, a.n) : parallel_for(a.n, grain_of(a.c * a.s), samples);
}

template <class T> void run_forward(const GroupNormSilu& a) {
  if (a.x.s == 1) a.silu ? planes<T, true>(a) : planes<T, false>(a);
  else a.silu ? rows<T, true>(a) : rows<T, false>(a);
}

inline void group_norm_silu(const GroupNormSilu& a) {
  with_dtype(a.x.dtype, [&](auto t) { run_forward<decltype(t)>(a); });
}

#endif

// group_norm_silu's backward. With u = x - m, h = u rstd, s = u A + B and ds = dy silu'(s), per sample and channel
//
//     P = sum ds,  Q = sum ds u,  H = sum u                       (first pass)
//     dx = ds A + u V + K,  V = -rstd^2 mean_g(dh h), K = -rstd mean_g(dh)    (second pass; dh = ds (1 + scale) weight)
//
// and every other gradient is a small sum of P, Q, H: no third pass, nothing stored between the two.
#ifndef FASTDIFF_ISA

#include "cpu/group_norm_silu.h"
#define FASTDIFF_KERNELS "cpu/group_norm_silu_backward.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void group_norm_silu_backward(const GroupNormSilu& a) { FASTDIFF_DISPATCH(group_norm_silu_backward, a); }
}  // namespace fastdiff

#else

#include "cpu/group_norm.h"

template <bool silu, class V> FD_INLINE V slope(V s, V dy) {
  if constexpr (!silu) return dy;
  const V sigma = sigmoid(s);
  return dy * sigma * fma(s, 1 - sigma, splat<V>(1.0f));
}

// The second pass's coefficients of one channel: dx = ds a + u v + k.
template <class A> struct Back { A v, k; };

struct Group { double mean, rstd; };
template <class A> FD_INLINE Group group_of(const GroupNormSilu& g, int64_t n, int64_t group) {
  const A* stats = static_cast<const A*>(g.stats) + 2 * (n * g.groups + group);
  return {stats[0], rstd_of(g, stats[1])};
}

// mean_g(dh) and mean_g(dh h) -> V and K of sample n's group. Writes the gradients that belong to (n, c), and the sample's
// share of dweight and dbias, [2, c] a sample, which add_parameters adds up in order of n: sums do not depend on threads.
template <class A> Back<A> finish_group(const GroupNormSilu& g, int64_t n, int64_t group, const Group& of, const double* p,
                                        const double* q, const double* h, double* share) {
  const int64_t per = g.c / g.groups, c0 = group * per;
  const double rstd = of.rstd, count = double(per) * double(g.s);
  double m1 = 0, m2 = 0;
  for (int64_t j = 0; j < per; ++j) {
    const double k = (1 + or_zero(static_cast<const A*>(g.scale), n * g.c + c0 + j)) * static_cast<const A*>(g.weight)[c0 + j];
    m1 += k * p[j];
    m2 += k * q[j] * rstd;
  }
  if (count > 0) m1 /= count, m2 /= count;
  const double v = -rstd * rstd * m2, k = -rstd * m1;
  for (int64_t j = 0; j < per; ++j) {
    const int64_t c = c0 + j, i = n * g.c + c;
    const double gain = 1 + or_zero(static_cast<const A*>(g.scale), i);
    const double w = static_cast<const A*>(g.weight)[c], b = static_cast<const A*>(g.bias)[c];
    if (g.dadd) static_cast<A*>(g.dadd)[i] = static_cast<A>(rstd * w * gain * p[j] + v * h[j] + k * double(g.s));
    if (g.dscale) static_cast<A*>(g.dscale)[i] = static_cast<A>(q[j] * rstd * w + p[j] * b);
    if (g.dshift) static_cast<A*>(g.dshift)[i] = static_cast<A>(p[j]);
    share[2 * n * g.c + c] = q[j] * gain * rstd;
    share[(2 * n + 1) * g.c + c] = p[j] * gain;
  }
  return {static_cast<A>(v), static_cast<A>(k)};
}

template <class A> void add_parameters(const GroupNormSilu& g, const double* share) {
  for (int64_t c = 0; c < g.c; ++c) {
    double w = 0, b = 0;
    for (int64_t n = 0; n < g.n; ++n) w += share[2 * n * g.c + c], b += share[(2 * n + 1) * g.c + c];
    static_cast<A*>(g.dweight)[c] = static_cast<A>(w);
    static_cast<A*>(g.dbias)[c] = static_cast<A>(b);
  }
}

// ---- contiguous channels

template <class T, bool silu>
FD_INLINE void sums_run(const T* x, const T* dy, int64_t n, const Channel<Acc<T>>& k, double& p, double& q, double& h) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const V m = splat<V>(k.m), a = splat<V>(k.a), b = splat<V>(k.b);
  p = q = h = 0;
  for (int64_t first = 0; first < n; first += kChunk) {  // partial sums stay short
    const int64_t last = first + kChunk < n ? first + kChunk : n;
    V vp[2] = {}, vq[2] = {}, vh[2] = {};
    const auto one = [&](V vx, V vdy, int j) __attribute__((always_inline)) {
      const V u = vx - m, ds = slope<silu>(fma(u, a, b), vdy);
      vp[j] += ds;
      vq[j] = fma(ds, u, vq[j]);
      vh[j] += u;
    };
    int64_t i = first;
    for (; i + 2 * N <= last; i += 2 * N)
      for (int j = 0; j < 2; ++j) one(load(x + i + j * N), load(dy + i + j * N), j);
    for (; i + N <= last; i += N) one(load(x + i), load(dy + i), 0);
    if (i < last) {
      const int rest = static_cast<int>(last - i);
      one(load_some(x + i, rest, k.m), load_some(dy + i, rest), 1);
    }
    p += sum(vp[0] + vp[1]), q += sum(vq[0] + vq[1]), h += sum(vh[0] + vh[1]);
  }
}

template <class T, bool silu>
FD_INLINE void dx_run(const T* x, const T* dy, T* dx, int64_t n, const Channel<Acc<T>>& k, const Back<Acc<T>>& back) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const V m = splat<V>(k.m), a = splat<V>(k.a), b = splat<V>(k.b), v = splat<V>(back.v), c = splat<V>(back.k);
  const auto one = [&](V vx, V vdy) __attribute__((always_inline)) {
    const V u = vx - m;
    return fma(slope<silu>(fma(u, a, b), vdy), a, fma(u, v, c));
  };
  int64_t i = 0;
  for (; i + N <= n; i += N) store(dx + i, one(load(x + i), load(dy + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_some(dx + i, one(load_some(x + i, rest), load_some(dy + i, rest)), rest);
  }
}

template <class T, bool silu> void planes(const GroupNormSilu& a, double* share) {
  typedef Acc<T> A;
  const int64_t per = a.c / a.groups;
  parallel_for(a.n * a.groups, grain_of(per * a.s), [&](int64_t begin, int64_t end) {
    const Scratch memory(per * (3 * 8 + sizeof(Channel<A>)) + 8);
    double *p = reinterpret_cast<double*>(memory.data), *q = p + per, *h = q + per;
    Channel<A>* k = reinterpret_cast<Channel<A>*>(h + per);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / a.groups, group = task % a.groups, c0 = group * per;
      const Group of = group_of<A>(a, n, group);
      for (int64_t j = 0; j < per; ++j) {
        k[j] = channel_map<A>(a, n, c0 + j, of.mean, of.rstd);
        sums_run<T, silu>(a.x.at<const T>(n, c0 + j), a.dy.at<const T>(n, c0 + j), a.s, k[j], p[j], q[j], h[j]);
      }
      const Back<A> back = finish_group<A>(a, n, group, of, p, q, h, share);
      for (int64_t j = 0; j < per; ++j)
        dx_run<T, silu>(a.x.at<const T>(n, c0 + j), a.dy.at<const T>(n, c0 + j), a.dx.at<T>(n, c0 + j), a.s, k[j], back);
    }
  });
}

// ---- channels-last

template <class T, bool silu>
void sums_block(const GroupNormSilu& g, int64_t n, int64_t c0, const ChannelTable<Acc<T>>& table, const ChannelSums& out) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const int64_t width = g.c - c0 < N ? g.c - c0 : N;
  const int some = static_cast<int>(width);
  const V m = load_some(table.m + c0, some), a = load_some(table.a + c0, some), b = load_some(table.b + c0, some);
  for (int64_t c = 0; c < width; ++c) out.row[0][c0 + c] = out.row[1][c0 + c] = out.row[2][c0 + c] = 0;
  for (int64_t first = 0; first < g.s; first += kRows) {
    const int64_t last = first + kRows < g.s ? first + kRows : g.s;
    V p = {}, q = {}, h = {};
    for (int64_t r = first; r < last; ++r) {
      const T *x = g.x.at<const T>(n, c0, r), *dy = g.dy.at<const T>(n, c0, r);
      const V u = (width == N ? load(x) : load_some(x, some)) - m;
      const V ds = slope<silu>(fma(u, a, b), width == N ? load(dy) : load_some(dy, some));
      p += ds;
      q = fma(ds, u, q);
      h += u;
    }
    for (int64_t c = 0; c < width; ++c) out.row[0][c0 + c] += p[c], out.row[1][c0 + c] += q[c], out.row[2][c0 + c] += h[c];
  }
}

template <class T, bool silu>
void dx_rows(const GroupNormSilu& g, int64_t n, const ChannelTable<Acc<T>>& table, const Acc<T>* v, const Acc<T>* k,
             int64_t begin, int64_t end) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  for (int64_t s = begin; s < end; ++s) {
    const T *x = g.x.at<const T>(n, 0, s), *dy = g.dy.at<const T>(n, 0, s);
    T* dx = g.dx.at<T>(n, 0, s);
    int64_t c = 0;
    for (; c + N <= g.c; c += N) {
      const V u = load(x + c) - load(table.m + c), a = load(table.a + c);
      const V ds = slope<silu>(fma(u, a, load(table.b + c)), load(dy + c));
      store(dx + c, fma(ds, a, fma(u, load(v + c), load(k + c))));
    }
    if (c < g.c) {
      const int rest = static_cast<int>(g.c - c);
      const V u = load_some(x + c, rest) - load_some(table.m + c, rest), a = load_some(table.a + c, rest);
      const V ds = slope<silu>(fma(u, a, load_some(table.b + c, rest)), load_some(dy + c, rest));
      store_some(dx + c, fma(ds, a, fma(u, load_some(v + c, rest), load_some(k + c, rest))), rest);
    }
  }
}

template <class T, bool silu> void rows(const GroupNormSilu& a, double* share) {
  typedef Acc<T> A;
  constexpr int64_t block = Simd<A>::N;
  const int64_t blocks = (a.c + block - 1) / block, per = a.c / a.groups;
  const int64_t table_at = ChannelSums::bytes(a.c), back_at = table_at + ChannelTable<A>::bytes(a.c);
  const auto finish = [&](int64_t n, const ChannelSums& sums, A* v, A* k) {
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t c0 = group * per;
      const Back<A> back =
          finish_group<A>(a, n, group, group_of<A>(a, n, group), sums.row[0] + c0, sums.row[1] + c0, sums.row[2] + c0, share);
      for (int64_t c = c0; c < c0 + per; ++c) v[c] = back.v, k[c] = back.k;
    }
  };
  // A sample a thread where there are enough samples, else a sample after the other by all threads; same sums either way.
  const bool inner = a.n < threads();
  const auto samples = [&](int64_t begin, int64_t end) {
    const Scratch memory(back_at + 2 * a.c * sizeof(A));
    const ChannelSums sums(memory.data, a.c);
    const ChannelTable<A> table(memory.data + table_at, a.c);
    A *v = reinterpret_cast<A*>(memory.data + back_at), *k = v + a.c;
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t c = 0; c < a.c; ++c) {
        const Group of = group_of<A>(a, n, c / per);
        const Channel<A> map = channel_map<A>(a, n, c, of.mean, of.rstd);
        table.m[c] = map.m, table.a[c] = map.a, table.b[c] = map.b;
      }
      const auto first = [&](int64_t i, int64_t j) {
        for (; i < j; ++i) sums_block<T, silu>(a, n, i * block, table, sums);
      };
      const auto second = [&](int64_t i, int64_t j) { dx_rows<T, silu>(a, n, table, v, k, i, j); };
      inner ? parallel_for(blocks, grain_of(block * a.s), first) : first(0, blocks);
      finish(n, sums, v, k);
      inner ? parallel_for(a.s, grain_of(a.c), second) : second(0, a.s);
    }
  };
  inner ? samples(0, a.n) : parallel_for(a.n, grain_of(a.c * a.s), samples);
}

template <class T> void run_backward(const GroupNormSilu& a) {
  const Scratch share((2 * a.n * a.c + 1) * 8);
  double* memory = reinterpret_cast<double*>(share.data);
  if (a.x.s == 1) a.silu ? planes<T, true>(a, memory) : planes<T, false>(a, memory);
  else a.silu ? rows<T, true>(a, memory) : rows<T, false>(a, memory);
  add_parameters<Acc<T>>(a, memory);
}

inline void group_norm_silu_backward(const GroupNormSilu& a) {
  with_dtype(a.x.dtype, [&](auto t) { run_backward<decltype(t)>(a); });
}

#endif

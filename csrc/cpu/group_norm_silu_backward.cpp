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

// dy silu'(s), to the same bits in both passes: in a group of one element dx is 0, all of ds cancelled by its mean.
template <class T, bool silu> FD_INLINE Vec<Acc<T>> slope(Vec<Acc<T>> s, Vec<Acc<T>> dy) {
  typedef Vec<Acc<T>> V;
  if constexpr (!silu) return dy;
  const V one = splat<V>(1.0f), sigma = sigmoid(s);
  return dy * sigma * fma(s, one - sigma, one);
}

// Where T is what we compute in, the first pass leaves ds in dx for the second, which then needs no exponential.
template <class T> constexpr bool kKeeps = std::is_same_v<T, Acc<T>>;

// Every channel's map, [n] tables.
template <class A> struct Maps {
  Scratch memory;
  int64_t c;
  explicit Maps(const GroupNormSilu& g) : memory(g.n * ChannelTable<A>::bytes(g.c)), c(g.c) {
    parallel_for(g.n, grain_of(g.c), [&](int64_t begin, int64_t end) {
      const Scratch doubles(2 * g.c * 8);
      for (int64_t n = begin; n < end; ++n) channel_maps<A>(g, n, reinterpret_cast<double*>(doubles.data), (*this)[n]);
    });
  }
  ChannelTable<A> operator[](int64_t n) const { return {memory.data + n * ChannelTable<A>::bytes(c), c}; }
};

// The sums of `c` channels, and after that the second pass's coefficients dx = ds a + u v + k.
template <class A> struct Sums {
  double *p, *q, *h;
  A *v, *k;
  Sums(char* memory, int64_t c)
      : p(reinterpret_cast<double*>(memory)), q(p + c), h(q + c), v(reinterpret_cast<A*>(h + c)), k(v + c) {}
  static int64_t bytes(int64_t c) { return aligned((3 * 8 + 2 * sizeof(A)) * c); }
};

// mean_g(dh) and mean_g(dh h) -> V and K of sample n's group. Writes the gradients that belong to (n, c), and the sample's
// share of dweight and dbias, [2, c] a sample, which add_parameters adds up in order of n: sums do not depend on threads.
template <class A>
void finish_group(const GroupNormSilu& g, int64_t n, int64_t group, const Sums<A>& s, int64_t at, double* share) {
  const int64_t per = g.c / g.groups, c0 = group * per;
  const double rstd = rstd_of(g, stats_of<A>(g, n, group)[1]), count = double(per) * double(g.s);
  const A *weight = static_cast<const A*>(g.weight) + c0, *bias = static_cast<const A*>(g.bias) + c0;
  const A* scale = g.scale ? static_cast<const A*>(g.scale) + n * g.c + c0 : nullptr;
  const double *p = s.p + at, *q = s.q + at, *h = s.h + at;
  double *dw = share + 2 * n * g.c + c0, *db = dw + g.c;
  double m1 = 0, m2 = 0;
  for (int64_t j = 0; j < per; ++j) {
    const double gain = 1 + or_zero(scale, j);
    dw[j] = q[j] * gain * rstd, db[j] = p[j] * gain;
    m1 += weight[j] * db[j], m2 += weight[j] * dw[j];
  }
  if (count > 0) m1 /= count, m2 /= count;
  const double v = -rstd * rstd * m2, k = -rstd * m1;
  for (int64_t j = 0; j < per; ++j) s.v[at + j] = static_cast<A>(v), s.k[at + j] = static_cast<A>(k);
  const auto out = [&](void* to) { return static_cast<A*>(to) + n * g.c + c0; };
  if (g.dadd)
    for (int64_t j = 0; j < per; ++j) out(g.dadd)[j] = static_cast<A>(rstd * weight[j] * db[j] + v * h[j] + k * double(g.s));
  if (g.dscale)
    for (int64_t j = 0; j < per; ++j) out(g.dscale)[j] = static_cast<A>(q[j] * rstd * weight[j] + p[j] * bias[j]);
  if (g.dshift)
    for (int64_t j = 0; j < per; ++j) out(g.dshift)[j] = static_cast<A>(p[j]);
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
FD_INLINE void sums_run(const T* x, const T* dy, T* kept, int64_t n, const ChannelTable<Acc<T>>& map, int64_t c,
                        const Sums<Acc<T>>& out, int64_t to) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  constexpr int64_t chunk = 128 * N;  // partial sums stay short
  const V m = splat<V>(map.m[c]), a = splat<V>(map.a[c]), b = splat<V>(map.b[c]);
  double p = 0, q = 0, h = 0;
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t last = first + chunk < n ? first + chunk : n;
    V vp[2] = {}, vq[2] = {}, vh[2] = {};
    const auto one = [&](V vx, V vdy, int j) __attribute__((always_inline)) {
      const V u = vx - m, ds = slope<T, silu>(fma(u, a, b), vdy);
      vp[j] += ds;
      vq[j] = fma(ds, u, vq[j]);
      vh[j] += u;
      return ds;
    };
    int64_t i = first;
    for (; i + 2 * N <= last; i += 2 * N)
      each<2>([&](int j) __attribute__((always_inline)) {
        const V ds = one(load(x + i + j * N), load(dy + i + j * N), j);
        if constexpr (kKeeps<T>) store(kept + i + j * N, ds);
      });
    for (; i < last; i += N) {
      const int rest = last - i < N ? static_cast<int>(last - i) : N;
      const V ds = rest == N ? one(load(x + i), load(dy + i), 0)
                             : one(load_some(x + i, rest, map.m[c]), load_some(dy + i, rest), 1);
      if constexpr (kKeeps<T>) rest == N ? store(kept + i, ds) : store_some(kept + i, ds, rest);
    }
    p += sum(vp[0] + vp[1]), q += sum(vq[0] + vq[1]), h += sum(vh[0] + vh[1]);
  }
  out.p[to] = p, out.q[to] = q, out.h[to] = h;
}

template <class T, bool silu>
FD_INLINE void dx_run(const T* x, const T* dy, T* dx, int64_t n, const ChannelTable<Acc<T>>& map, int64_t c, Acc<T> v_,
                      Acc<T> k_) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const V m = splat<V>(map.m[c]), a = splat<V>(map.a[c]), b = splat<V>(map.b[c]), v = splat<V>(v_), k = splat<V>(k_);
  const T* top = kKeeps<T> ? dx : dy;
  const auto one = [&](V vx, V t) __attribute__((always_inline)) {
    const V u = vx - m;
    if constexpr (!kKeeps<T>) t = slope<T, silu>(fma(u, a, b), t);
    return fma(t, a, fma(u, v, k));
  };
  int64_t i = 0;
  for (; i + N <= n; i += N) store(dx + i, one(load(x + i), load(top + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_some(dx + i, one(load_some(x + i, rest), load_some(top + i, rest)), rest);
  }
}

// A task is a group.
template <class T, bool silu> void planes(const GroupNormSilu& g, double* share) {
  typedef Acc<T> A;
  const int64_t per = g.c / g.groups;
  const Maps<A> maps(g);
  const auto first = [&](char* memory, int64_t task, int64_t j) {
    const int64_t n = task / g.groups, c = task % g.groups * per + j;
    sums_run<T, silu>(g.x.at<const T>(n, c), g.dy.at<const T>(n, c), g.dx.at<T>(n, c), g.s, maps[n], c, {memory, per}, j);
  };
  const auto finish = [&](char* memory, int64_t task) {
    finish_group<A>(g, task / g.groups, task % g.groups, {memory, per}, 0, share);
  };
  const auto second = [&](char* memory, int64_t task, int64_t begin, int64_t end) {
    const Sums<A> sums(memory, per);
    const int64_t n = task / g.groups, c0 = task % g.groups * per;
    for (int64_t c = c0 + begin; c < c0 + end; ++c)
      dx_run<T, silu>(g.x.at<const T>(n, c), g.dy.at<const T>(n, c), g.dx.at<T>(n, c), g.s, maps[n], c, sums.v[0],
                      sums.k[0]);
  };
  run_stages({g.n * g.groups, per * g.s, Sums<A>::bytes(per), per, per}, first, finish, second);
}

// ---- channels-last

// One stretch of J vectors of channels from c on, over pixels begin ... end - 1: P, Q, H to `out`, [3, M N].
template <class T, bool silu, int J>
__attribute__((noinline)) void sums_stretch(const GroupNormSilu& g, int64_t n, int64_t c, int64_t begin, int64_t end,
                                            int some, const ChannelTable<Acc<T>>& map, Acc<T>* out) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N, M = J ? J : 1;
  V m[M], a[M], b[M], p[M] = {}, q[M] = {}, h[M] = {};
  each<M>([&](int j) __attribute__((always_inline)) {
    m[j] = load_at<J>(map.m + c, j, some), a[j] = load_at<J>(map.a + c, j, some), b[j] = load_at<J>(map.b + c, j, some);
  });
  const T *x = g.x.at<const T>(n, c, begin), *dy = g.dy.at<const T>(n, c, begin);
  T* kept = g.dx.at<T>(n, c, begin);
  for (int64_t r = begin; r < end; ++r, x += g.x.s, dy += g.dy.s, kept += g.dx.s)
    each<M>([&](int j) __attribute__((always_inline)) {
      ahead(x + kAhead * g.x.s, j), ahead(dy + kAhead * g.dy.s, j);
      const V u = load_at<J>(x, j, some) - m[j];
      const V ds = slope<T, silu>(fma(u, a[j], b[j]), load_at<J>(dy, j, some));
      if constexpr (kKeeps<T>) store_at<J>(kept, ds, j, some);
      p[j] += ds;
      q[j] = fma(ds, u, q[j]);
      h[j] += u;
    });
  each<M>([&](int j) __attribute__((always_inline)) {
    store(out + j * N, p[j]), store(out + (M + j) * N, q[j]), store(out + (2 * M + j) * N, h[j]);
  });
}

template <class T, bool silu, int J>
FD_INLINE void sums_block(const GroupNormSilu& g, int64_t n, int64_t c, int64_t begin, int64_t end, int some,
                          const ChannelTable<Acc<T>>& map, const Sums<Acc<T>>& out) {
  typedef Acc<T> A;
  constexpr int N = Simd<A>::N, M = J ? J : 1, D = W / 2;
  alignas(64) A part[3 * M * N];
  alignas(64) double total[3 * M * N] = {};
  for (int64_t first = begin; first < end; first += kRows) {
    sums_stretch<T, silu, J>(g, n, c, first, first + kRows < end ? first + kRows : end, some, map, part);
    for (int i = 0; i < 3 * M * N; i += D) narrow(total + i, wide(total + i) + wide(part + i));
  }
  for (int i = 0; i < (J ? M * N : some); ++i)
    out.p[c + i] = total[i], out.q[c + i] = total[M * N + i], out.h[c + i] = total[2 * M * N + i];
}

template <class T, bool silu>
void dx_rows(const GroupNormSilu& g, int64_t n, const ChannelTable<Acc<T>>& map, const Sums<Acc<T>>& sums, int64_t begin,
             int64_t end) {
  typedef Vec<Acc<T>> V;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t last = first + kTile < end ? first + kTile : end;
    by_vectors<2, Acc<T>>(0, g.c, [&](auto j_, int64_t c) __attribute__((always_inline)) {
      constexpr int J = decltype(j_)::value, M = J ? J : 1;
      const int some = static_cast<int>(g.c - c);
      V m[M], a[M], b[M], v[M], k[M];
      each<M>([&](int j) __attribute__((always_inline)) {
        m[j] = load_at<J>(map.m + c, j, some), a[j] = load_at<J>(map.a + c, j, some), b[j] = load_at<J>(map.b + c, j, some);
        v[j] = load_at<J>(sums.v + c, j, some), k[j] = load_at<J>(sums.k + c, j, some);
      });
      for (int64_t r = first; r < last; ++r) {
        const T* x = g.x.at<const T>(n, c, r);
        T* dx = g.dx.at<T>(n, c, r);
        const T* top = kKeeps<T> ? dx : g.dy.at<const T>(n, c, r);
        each<M>([&](int j) __attribute__((always_inline)) {
          const V u = load_at<J>(x, j, some) - m[j];
          V ds = load_at<J>(top, j, some);
          if constexpr (!kKeeps<T>) ds = slope<T, silu>(fma(u, a[j], b[j]), ds);
          store_at<J>(dx, fma(ds, a[j], fma(u, v[j], k[j])), j, some);
        });
      }
    });
  }
}

// A task is a sample: sums of pieces of pixels and blocks of channels, then groups, then dx.
template <class T, bool silu> void rows(const GroupNormSilu& g, double* share) {
  typedef Acc<T> A;
  constexpr int64_t block = block_channels<A>();
  const int64_t height = piece_rows(g.c), pieces = (g.s + height - 1) / height, blocks = (g.c + block - 1) / block;
  const Maps<A> maps(g);
  const auto first = [&](char* memory, int64_t n, int64_t item) {
    const int64_t piece = item / blocks, c0 = item % blocks * block, c1 = c0 + block < g.c ? c0 + block : g.c;
    const int64_t top = piece * height, bottom = top + height < g.s ? top + height : g.s;
    const Sums<A> sums(memory + piece * Sums<A>::bytes(g.c), g.c);
    by_vectors<2, A>(c0, c1, [&](auto j, int64_t c) __attribute__((always_inline)) {
      sums_block<T, silu, decltype(j)::value>(g, n, c, top, bottom, static_cast<int>(c1 - c), maps[n], sums);
    });
  };
  const auto finish = [&](char* memory, int64_t n) {
    const Sums<A> sums(memory, g.c);
    if (pieces == 0)
      for (int64_t i = 0; i < 3 * g.c; ++i) sums.p[i] = 0;
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const double* more = Sums<A>(memory + piece * Sums<A>::bytes(g.c), g.c).p;
      for (int64_t i = 0; i < 3 * g.c; ++i) sums.p[i] += more[i];
    }
    for (int64_t group = 0; group < g.groups; ++group) finish_group<A>(g, n, group, sums, group * (g.c / g.groups), share);
  };
  const auto second = [&](char* memory, int64_t n, int64_t begin, int64_t end) {
    dx_rows<T, silu>(g, n, maps[n], {memory, g.c}, begin, end);
  };
  run_stages({g.n, g.c * g.s, (pieces > 0 ? pieces : 1) * Sums<A>::bytes(g.c), pieces * blocks, g.s}, first, finish, second);
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

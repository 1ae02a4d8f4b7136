// What one thread does between two barriers of the channels-last group_norm_silu: statements in group_norm_silu.cu's order.
// Host code when nvcc is not there, so that a test can run every thread of every block of a cluster one after the other.
//
// A thread's vectors are one column of 16 bytes: vector v = t mod V of row t / V, then every R-th row. What it copies into
// shared memory it alone reads again. Sums of a channel go thread -> [R, width] in shared memory -> groups, in fixed order.
#pragma once
#include <cmath>

#include "cuda/group_norm_silu.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#define FD_DEVICE __device__ __forceinline__
#else
#define FD_DEVICE inline
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
#endif

namespace fastdiff {

#ifdef __CUDACC__
FD_DEVICE float bits_float(uint32_t u) { return __uint_as_float(u); }
FD_DEVICE void two(uint32_t w, float* v, bfloat16) { v[0] = bits_float(w << 16), v[1] = bits_float(w & 0xFFFF0000u); }
FD_DEVICE void two(uint32_t w, float* v, float16) {
  const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w));
  v[0] = f.x, v[1] = f.y;
}
FD_DEVICE uint32_t pair(float a, float b, bfloat16) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
FD_DEVICE uint32_t pair(float a, float b, float16) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
FD_DEVICE uint32_t float_bits(float f) { return __float_as_uint(f); }
FD_DEVICE float scalar_at(const Parameter& p, int64_t i) {
  switch (p.dtype) {
    case Dtype::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p.data)[i]);
    case Dtype::f16: return __half2float(static_cast<const __half*>(p.data)[i]);
    case Dtype::f64: return static_cast<float>(static_cast<const double*>(p.data)[i]);
    default: return static_cast<const float*>(p.data)[i];
  }
}
FD_DEVICE void fetch16(uint4* to, const uint4* from) { __pipeline_memcpy_async(to, from, 16); }
FD_DEVICE void fetched() { __pipeline_commit(), __pipeline_wait_prior(0); }
// s sigmoid(s). The clamps keep the reciprocal of 1 + e a normal number; fminf turns NaN into the clamp, but s carries it.
template <bool precise> FD_DEVICE float silu_of(float s) {
  float e, r;
  if constexpr (precise) e = expf(fminf(-s, 87.0f));
  else asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fminf(s * -1.44269504f, 125.0f)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
  return s * r;
}
#else
inline float bits_float(uint32_t u) { return bits_as<float>(u); }
inline uint32_t float_bits(float f) { return bits_as<uint32_t>(f); }
template <class T> void two(uint32_t w, float* v, T) {
  v[0] = to_float(T{static_cast<uint16_t>(w)}), v[1] = to_float(T{static_cast<uint16_t>(w >> 16)});
}
template <class T> uint32_t pair(float a, float b, T) {
  return from_float<T>(a).bits | uint32_t{from_float<T>(b).bits} << 16;
}
inline float scalar_at(const Parameter& p, int64_t i) {
  return with_dtype(p.dtype, [&](auto t) { return float(to_float(static_cast<const decltype(t)*>(p.data)[i])); });
}
inline void fetch16(uint4* to, const uint4* from) { *to = *from; }
inline void fetched() {}
template <bool> float silu_of(float s) { return s / (1 + std::exp(std::fmin(-s, 87.0f))); }
using std::fma;
using std::sqrt;
#endif

template <class T> FD_DEVICE void unpack(const uint4& u, float* v) {
  if constexpr (sizeof(T) == 4) {
    v[0] = bits_float(u.x), v[1] = bits_float(u.y), v[2] = bits_float(u.z), v[3] = bits_float(u.w);
  } else {
    two(u.x, v, T{}), two(u.y, v + 2, T{}), two(u.z, v + 4, T{}), two(u.w, v + 6, T{});
  }
}
template <class T> FD_DEVICE uint4 packed(const float* v) {
  if constexpr (sizeof(T) == 4) return {float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])};
  else return {pair(v[0], v[1], T{}), pair(v[2], v[3], T{}), pair(v[4], v[5], T{}), pair(v[6], v[7], T{})};
}

template <class T> struct NormBlock {
  static constexpr int E = 16 / sizeof(T);       // channels of a vector
  static constexpr bool kPrecise = sizeof(T) == 4;  // follow what rounding a mean loses

  int64_t n;
  int rank, first, count;  // this block's pixels: first ... first + count - 1
  int c0, width, per, groups, vectors, across, lanes;
  uint4* kept;        // [slots, kThreads]
  float *sums[2];     // [across, width] each
  float *gain, *offset, *add;  // [width]
  float* part;        // [groups, 3]: mean in two parts and sum of squared deviations of this block, read by the others
  float* stat;        // [groups, 2]: mean and 1 / standard deviation
  float* total;       // [groups]: this block's mean
  float *lane_sum[2];  // [groups, lanes] each

  FD_DEVICE NormBlock(const GroupNormSiluCuda& a, const NormPlan& p, uint32_t block, char* shared) {
    const uint32_t slice = block / static_cast<uint32_t>(p.ranks), slices = static_cast<uint32_t>(p.slices);
    rank = static_cast<int>(block - slice * p.ranks), n = slice / slices;
    c0 = static_cast<int>(slice % slices) * p.width;
    width = static_cast<int>(a.c) - c0 < p.width ? static_cast<int>(a.c) - c0 : p.width;
    per = p.per, groups = width / per, vectors = width / E, across = kThreads / vectors;
    lanes = kThreads / groups < 32 ? kThreads / groups : 32;
    first = rank * p.rows, count = pixels_of(a, p, rank);
    kept = reinterpret_cast<uint4*>(shared);
    float* f = reinterpret_cast<float*>(kept + (a.given ? 0 : p.slots * kThreads));
    sums[0] = f, sums[1] = f + kThreads * E, f += 2 * kThreads * E;
    gain = f, offset = f + width, add = f + 2 * width, f += 3 * width;
    part = f, stat = f + 3 * groups, total = f + 5 * groups, f += 6 * groups;
    lane_sum[0] = f, lane_sum[1] = f + kThreads;
  }
  FD_DEVICE static int pixels_of(const GroupNormSiluCuda& a, const NormPlan& p, int r) {
    const int64_t rest = a.s - int64_t{r} * p.rows;
    return static_cast<int>(rest < 0 ? 0 : rest < p.rows ? rest : p.rows);
  }

  // The column of thread t: its first row, past the end where the thread is left over; its first channel.
  FD_DEVICE int row_of(int t) const { return t < vectors * across ? t / vectors : count; }
  FD_DEVICE int channel_of(int t) const { return t % vectors * E; }
  FD_DEVICE const uint4* source(const GroupNormSiluCuda& a, int t, int row) const {
    const int64_t at = n * a.x_n + (first + row) * a.x_s + c0 + channel_of(t);
    return reinterpret_cast<const uint4*>(static_cast<const T*>(a.x) + at);
  }

  // x into shared memory, parameters beside it.
  template <bool given> FD_DEVICE void fetch(const GroupNormSiluCuda& a, int t) const {
    if constexpr (!given) {
      uint4* to = kept + t;
      const uint4* from = source(a, t, row_of(t));
      const int64_t step = across * a.x_s * static_cast<int64_t>(sizeof(T)) / 16;
      for (int row = row_of(t); row < count; row += across, to += kThreads, from += step) fetch16(to, from);
    }
    for (int c = t; c < width; c += kThreads) {
      const int64_t i = n * a.c + c0 + c;
      const float more = a.scale.data ? 1.0f + scalar_at(a.scale, i) : 1.0f;
      const float shift = a.shift.data ? scalar_at(a.shift, i) : 0.0f;
      gain[c] = more * scalar_at(a.weight, c0 + c);
      offset[c] = fma(more, scalar_at(a.bias, c0 + c), shift);
      add[c] = a.add.data ? scalar_at(a.add, i) : 0.0f;
    }
  }

  FD_DEVICE void store_sums(float* to, int t, const float* s) const {
    if (t >= vectors * across) return;
    for (int e = 0; e < E; e += 4) reinterpret_cast<float4*>(to + t * E + e)[0] = {s[e], s[e + 1], s[e + 2], s[e + 3]};
  }
  FD_DEVICE void sum(int t) const {
    fetched();
    float s[E] = {}, v[E];
    const uint4* from = kept + t;
    for (int row = row_of(t); row < count; row += across, from += kThreads) {
      unpack<T>(*from, v);
#pragma unroll
      for (int e = 0; e < E; ++e) s[e] += v[e];
    }
    store_sums(sums[0], t, s);
  }

  // [across, width] -> `lanes` partial sums a group.
  FD_DEVICE void fold(int which, int t) const {
    const int group = t / lanes, lane = t % lanes;
    if (group >= groups) return;
    const float* from = sums[which] + group * per;
    const int rows = lanes / per, rest = lanes - rows * per;
    float s = 0;
    for (int row = lane / per, j = lane % per; row < across;) {
      s += from[row * width + j];
      row += rows, j += rest;
      if (j >= per) j -= per, ++row;
    }
    lane_sum[which][t] = s;
  }
  FD_DEVICE float folded(int which, int group) const {
    float s = 0;
    for (int i = 0; i < lanes; ++i) s += lane_sum[which][group * lanes + i];
    return s;
  }
  FD_DEVICE void block_mean(int t) const {
    if (t >= groups) return;
    float more = 0;
    for (int j = 0; j < per; ++j) more += add[t * per + j];
    total[t] = count ? fma(more, static_cast<float>(count), folded(0, t)) / (static_cast<float>(count) * per) : 0.0f;
  }

  // Sums of squares around the block's mean, and what they are off it.
  FD_DEVICE void deviations(int t) const {
    float center[E], d[E] = {}, q[E] = {}, v[E], slip[E];
    const int c = channel_of(t);
    int group = c / per, next = (group + 1) * per;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (c + e == next) next += per, ++group;
      const float mean = total[group];
      center[e] = mean - add[c + e];
      if (kPrecise) slip[e] = static_cast<float>(center[e] - (static_cast<double>(mean) - add[c + e]));
    }
    const uint4* from = kept + t;
    for (int row = row_of(t); row < count; row += across, from += kThreads) {
      unpack<T>(*from, v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float away = kPrecise ? (v[e] - center[e]) + slip[e] : v[e] - center[e];
        q[e] = fma(away, away, q[e]);
        if (kPrecise) d[e] += away;
      }
    }
    store_sums(sums[0], t, q);
    if (kPrecise) store_sums(sums[1], t, d);
  }
  FD_DEVICE void block_moments(int t) const {
    if (t >= groups) return;
    float moved = 0, m2 = folded(0, t);
    if (kPrecise && count) {
      const float size = static_cast<float>(count) * per;
      moved = folded(1, t) / size;
      m2 -= moved * moved * size;
    }
    part[3 * t] = total[t], part[3 * t + 1] = moved, part[3 * t + 2] = m2 < 0 ? 0 : m2;
  }

  // The slice's statistics from all ranks' parts, in order: Chan's merge, of means less the first
  // one's, since a float mean of an image far from zero has no digits left for them. theirs(rank): that block's `part`.
  template <bool given, class F>
  FD_DEVICE void merge(const GroupNormSiluCuda& a, const NormPlan& p, int t, const F& theirs) const {
    if (t >= groups) return;
    float* out = a.stats + 2 * (n * a.groups + c0 / per + t);
    if constexpr (!given) {
      float size = 0, away = 0, m2 = 0;
      const float origin = theirs(0)[3 * t];  // rank 0 always has pixels
      for (int r = 0; r < p.ranks; ++r) {
        const float more = static_cast<float>(pixels_of(a, p, r)) * per;
        if (more == 0) continue;
        const float* other = theirs(r) + 3 * t;
        const float delta = (other[0] - origin) + other[1] - away, both = size + more;
        m2 += other[2] + delta * delta * (size * more / both);
        away += delta * (more / both);
        size = both;
      }
      const float mean = origin + away;
      stat[2 * t] = mean, stat[2 * t + 1] = m2 / size;
      if (rank == 0) out[0] = mean, out[1] = m2 / size;
    } else {
      stat[2 * t] = out[0], stat[2 * t + 1] = out[1];
    }
    stat[2 * t + 1] = 1.0f / sqrt(stat[2 * t + 1] + a.eps);
  }

  // s = (x - add) gain + offset, add being mean - add rounded, and offset making up for the rounding.
  FD_DEVICE void coefficients(int t) const {
    for (int c = t; c < width; c += kThreads) {
      const float mean = stat[c / per * 2], slope = gain[c] * stat[c / per * 2 + 1], less = add[c];
      const float m = mean - less, back = m - mean, lost = (mean - (m - back)) - (less + back);  // mean - less = m + lost
      gain[c] = slope, offset[c] = fma(-lost, slope, offset[c]), add[c] = m;
    }
  }

  template <bool silu, bool given> FD_DEVICE void apply(const GroupNormSiluCuda& a, int t) const {
    float g[E], o[E], m[E], v[E];
    const int c = channel_of(t);
#pragma unroll
    for (int e = 0; e < E; ++e) g[e] = gain[c + e], o[e] = offset[c + e], m[e] = add[c + e];
    int row = row_of(t);
    const uint4* from = kept + t;
    int64_t step = kThreads;
    if constexpr (given) from = source(a, t, row), step = across * a.x_s * static_cast<int64_t>(sizeof(T)) / 16;
    const int64_t out_step = across * a.y_s * static_cast<int64_t>(sizeof(T)) / 16;
    uint4* to = reinterpret_cast<uint4*>(static_cast<T*>(a.y) + n * a.y_n + (first + row) * a.y_s + c0 + c);
    for (; row < count; row += across, from += step, to += out_step) {
      unpack<T>(*from, v);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const float s = fma(v[e] - m[e], g[e], o[e]);
        v[e] = silu ? silu_of<kPrecise>(s) : s;
      }
      *to = packed<T>(v);
    }
  }
};

}  // namespace fastdiff

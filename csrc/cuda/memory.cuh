// How a thread reads and writes its elements of a tensor: 16 bytes at a time where the tensor's layout allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cpu/common.h"

namespace fastdiff {

__device__ inline void convert(float v, float& out) { out = v; }
__device__ inline void convert(float v, double& out) { out = v; }
__device__ inline void convert(double v, double& out) { out = v; }
__device__ inline void convert(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
__device__ inline void convert(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void convert(__nv_bfloat16 v, float& out) { out = __bfloat162float(v); }
__device__ inline void convert(__half v, float& out) { out = __half2float(v); }

// N elements in accesses of 16 bytes, or of 8 where N elements are no multiple of 16; aligned so.
template <int BYTES> struct Wide { typedef uint4 type; };
template <> struct Wide<8> { typedef uint2 type; };
template <int N, class T> constexpr int kWide = N * sizeof(T) % 16 == 0 ? 16 : 8;

template <int N, class T, class A> __device__ void load_wide(const T* p, A (&v)[N]) {
  constexpr int bytes = kWide<N, T>, per = bytes / sizeof(T);
  typedef typename Wide<bytes>::type W;
#pragma unroll
  for (int i = 0; i < N; i += per) {
    alignas(16) T raw[per];
    *reinterpret_cast<W*>(raw) = *reinterpret_cast<const W*>(p + i);
#pragma unroll
    for (int j = 0; j < per; ++j) convert(raw[j], v[i + j]);
  }
}
template <int N, class T, class A> __device__ void store_wide(T* p, const A (&v)[N]) {
  constexpr int bytes = kWide<N, T>, per = bytes / sizeof(T);
  typedef typename Wide<bytes>::type W;
#pragma unroll
  for (int i = 0; i < N; i += per) {
    alignas(16) T raw[per];
#pragma unroll
    for (int j = 0; j < per; ++j) convert(v[i + j], raw[j]);
    *reinterpret_cast<W*>(p + i) = *reinterpret_cast<const W*>(raw);
  }
}

// A thread's share of a sample: E logical neighbours, of one channel or (C = 3) of each channel. How a tensor holds it:
enum class Lie {
  run,     // the E of a channel side by side
  pixels,  // all C E of them side by side, a pixel's channels together, aligned
  apart    // each by itself
};

// Where a thread is: element `first` of the sample (C = 1), or pixel `first` of every channel; `end` elements or pixels
// exist.
struct Place { int64_t sample, first, end, pixels; };

template <int C, int E, class T, class A> __device__ void read(const View& t, Lie lie, const Place& at, A (&v)[C][E]) {
  const T* p = static_cast<const T*>(t.data) + at.sample * t.n;
  if (lie == Lie::run) {
#pragma unroll
    for (int c = 0; c < C; ++c) load_wide<E>(p + c * t.c + at.first, v[c]);
  } else if (C > 1 && lie == Lie::pixels) {
    A all[C * E];
    load_wide<C * E>(p + at.first * C, all);
#pragma unroll
    for (int i = 0; i < C * E; ++i) v[i % C][i / C] = all[i];
  } else if (C == 1) {
    int64_t channel = at.first / at.pixels, pixel = at.first % at.pixels;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      v[0][i] = 0;
      if (at.first + i < at.end) convert(p[channel * t.c + pixel * t.s], v[0][i]);
      if (++pixel == at.pixels) pixel = 0, ++channel;
    }
  }
}
template <int C, int E, class T, class A>
__device__ void write(const View& t, Lie lie, const Place& at, const A (&v)[C][E]) {
  T* p = static_cast<T*>(t.data) + at.sample * t.n;
  if (lie == Lie::run) {
#pragma unroll
    for (int c = 0; c < C; ++c) store_wide<E>(p + c * t.c + at.first, v[c]);
  } else if (C > 1 && lie == Lie::pixels) {
    A all[C * E];
#pragma unroll
    for (int i = 0; i < C * E; ++i) all[i] = v[i % C][i / C];
    store_wide<C * E>(p + at.first * C, all);
  } else if (C == 1) {
    int64_t channel = at.first / at.pixels, pixel = at.first % at.pixels;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      if (at.first + i < at.end) convert(v[0][i], p[channel * t.c + pixel * t.s]);
      if (++pixel == at.pixels) pixel = 0, ++channel;
    }
  }
}

// `lie` of a tensor [n, c, s] for threads with E elements of C channels; whole: no thread's share is cut short.
inline Lie lie_of(const View& t, int64_t c, int64_t s, int channels, int elements, bool whole) {
  const int64_t size = t.dtype == Dtype::f64 ? 8 : t.dtype == Dtype::f32 ? 4 : 2;
  const int64_t unit = elements * size % 16 == 0 ? 16 : 8;
  const bool aligned = whole && reinterpret_cast<uintptr_t>(t.data) % unit == 0 && t.n * size % unit == 0;
  if (!aligned) return Lie::apart;
  if (channels == 1) return is_flat(t, c, s) ? Lie::run : Lie::apart;
  if (t.s == 1 && t.c * size % unit == 0) return Lie::run;
  return t.c == 1 && t.s == c ? Lie::pixels : Lie::apart;
}

// A grid of 256 threads a block that walks `shares` of each of `samples`; each block keeps to one sample at a time.
inline dim3 grid_of(int64_t shares, int64_t samples) {
  const int64_t x = (shares + 255) / 256;
  return dim3(static_cast<unsigned>(x < 65536 ? x : 65536), static_cast<unsigned>(samples < 65535 ? samples : 65535));
}

}  // namespace fastdiff

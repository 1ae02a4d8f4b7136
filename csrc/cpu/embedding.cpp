// embedding: angles reduced to quarter turns in float64, then Box-Muller's sine and cosine. Formula:
// fastdiff/ops/embedding.py.
#ifndef FASTDIFF_ISA

#include <cmath>

#include "cpu/embedding.h"
#include "philox.h"
#define FASTDIFF_KERNELS "cpu/embedding.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void embedding(const Embedding& a) { FASTDIFF_DISPATCH(embedding, a); }
}  // namespace fastdiff

#else

#include "cpu/noise.h"

constexpr double kTwoOverPi = 0.63661977236758134308;
constexpr double kLargest = 134217728;         // quarter turns: beyond 2^27 their rounding, 2^-53 of it, shows in float32
constexpr double kToInteger = 6755399441055744;  // 1.5 2^52: adding it rounds to the nearest integer, kept in the low bits

typedef uint32_t half_vu FD_VECTOR(kBytes / 2);

// One row: whole vectors all along, so that rows have room for a multiple of W.
template <class T>
void embed_row(const Embedding& a, double t, const double* turns, bool far, float* q, uint32_t* quarter, T* sines,
               T* cosines) {
  for (int64_t i = 0; i < a.h; i += W / 2) {
    const vd u = t * wide(turns + i), shifted = u + kToInteger;
    narrow(q + i, u - (shifted - kToInteger));
    const auto low = __builtin_convertvector(reinterpret_cast<vq>(shifted), half_vu);
    __builtin_memcpy(quarter + i, &low, sizeof low);
  }
  for (int64_t i = 0; i < a.h; i += W) {
    const int left = a.h - i < W ? static_cast<int>(a.h - i) : W;
    vu turn;
    __builtin_memcpy(&turn, quarter + i, sizeof turn);
    vf sin, cos;
    quarter_turns(load(static_cast<const float*>(q + i)), turn, cos, sin);
    if (left == W) store(sines + i, sin), store(cosines + i, cos);
    else store_some(sines + i, sin, left), store_some(cosines + i, cos, left);
  }
  for (int64_t i = 0; far && i < a.h; ++i) {
    if (!(__builtin_fabs(t * turns[i]) > kLargest)) continue;
    const double angle = t * a.freqs[i] * a.scale;
    sines[i] = from_float<T>(static_cast<float>(__builtin_sin(angle)));
    cosines[i] = from_float<T>(static_cast<float>(__builtin_cos(angle)));
  }
}

template <class T> void embed(const Embedding& a) {
  T* out = static_cast<T*>(a.out);
  const int64_t room = (a.h + W - 1) / W * W;
  const Scratch table(room * sizeof(double));
  double* turns = reinterpret_cast<double*>(table.data);
  double largest = 0;
  for (int64_t i = 0; i < a.h; ++i) {
    turns[i] = a.freqs[i] * (a.scale * kTwoOverPi);
    largest = __builtin_fmax(largest, __builtin_fabs(turns[i]));  // skips NaN
  }
  for (int64_t i = a.h; i < room; ++i) turns[i] = 0;
  parallel_for(a.n, 1 + 4096 / (a.h + 1), [&](int64_t begin, int64_t end) {
    const Scratch memory(room * (sizeof(float) + sizeof(uint32_t)));
    float* q = reinterpret_cast<float*>(memory.data);
    uint32_t* quarter = reinterpret_cast<uint32_t*>(q + room);
    for (int64_t i = a.h; i < room; ++i) q[i] = 0, quarter[i] = 0;
    for (int64_t b = begin; b < end; ++b) {
      T *first = out + 2 * b * a.h, *second = first + a.h;
      const bool far = !(__builtin_fabs(a.t[b]) * largest <= kLargest);
      embed_row(a, a.t[b], turns, far, q, quarter, a.sin_first ? first : second, a.sin_first ? second : first);
    }
  });
}

template <class T> void embed_wide(const Embedding& a) {
  T* out = static_cast<T*>(a.out);
  parallel_for(a.n * a.h, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / a.h;
      const double angle = a.scale * (a.t[b] * a.freqs[i % a.h]);
      T* to = out + i + b * a.h;  // row b, column i % h
      to[a.sin_first ? 0 : a.h] = from_float<T>(static_cast<Acc<T>>(__builtin_sin(angle)));
      to[a.sin_first ? a.h : 0] = from_float<T>(static_cast<Acc<T>>(__builtin_cos(angle)));
    }
  });
}

inline void embedding(const Embedding& a) {
  with_dtype(a.dtype, [&](auto type) {
    typedef decltype(type) T;
    if constexpr (std::is_same_v<T, double>) embed_wide<T>(a);
    else a.wide ? embed_wide<T>(a) : embed<T>(a);
  });
}

#endif

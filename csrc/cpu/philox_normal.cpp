// philox_normal: noise written straight into the result. Formula and contract: fastdiff/ops/philox_normal.py.
#ifndef FASTDIFF_ISA

#include "cpu/philox_normal.h"
#include "philox.h"
#define FASTDIFF_KERNELS "cpu/philox_normal.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void philox_normal(const PhiloxNormal& a) { FASTDIFF_DISPATCH(philox_normal, a); }
}  // namespace fastdiff

#else

#include "cpu/noise.h"

constexpr int64_t kPiece = 1024;  // elements a task makes: whole blocks, a float buffer that stays in L1

template <class T> void fill(T* out, const Stream& s, int64_t first, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    noise_run(s, first, n, out);
  } else {
    float z[kPiece];
    noise_run(s, first, n, z);
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < n; ++i) out[i] = z[i];
    } else {
      int64_t i = 0;
      for (; i + W <= n; i += W) store(out + i, load(static_cast<const float*>(z + i)));
      if (i < n) store_some(out + i, load(static_cast<const float*>(z + i)), static_cast<int>(n - i));
    }
  }
}

template <class T> void fill_all(const PhiloxNormal& a) {
  const int64_t pieces = (a.size + kPiece - 1) / kPiece;
  parallel_for(a.batch * pieces, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / pieces, first = task % pieces * kPiece;
      const int64_t n = a.size - first < kPiece ? a.size - first : kPiece;
      fill(static_cast<T*>(a.out) + b * a.size + first, stream_of(a.seeds[b], a.draw, a.domain), first, n);
    }
  });
}

inline void philox_normal(const PhiloxNormal& a) {
  with_dtype(a.dtype, [&](auto t) { fill_all<decltype(t)>(a); });
}

#endif

// denoise_step: one row of a plan, tile by tile. What a row's coefficients do not need is not read, noise included.
// Formula: fastdiff/ops/denoise_step.py.
#ifndef FASTDIFF_ISA

#include "cpu/denoise_step.h"
#include "philox.h"
#define FASTDIFF_KERNELS "cpu/denoise_step.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void denoise_step(const DenoiseStep& a) { FASTDIFF_DISPATCH(denoise_step, a); }
}  // namespace fastdiff

#else

#include "cpu/noise.h"
#include "cpu/tile.h"

template <class A> struct Buffers { A *x, *f, *other, *kept, *out; float* z; };

// out += amount * v
template <class A, class B> FD_INLINE void accumulate(A* out, A amount, const B* v, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] += amount * v[i];
}

template <class A> FD_INLINE A clip(A d) { return d < -1 ? A(-1) : d > 1 ? A(1) : d; }  // NaN stays

template <class A>
void step_tile(const DenoiseStep& a, const Tiling& t, int64_t n, int64_t first, int64_t length, const Buffers<A>& b) {
  const int64_t row = a.row[a.row_per_sample ? n : 0], size = t.channels * length;
  const A* c = static_cast<const A*>(a.coefficients) + row * column::kCount;
  const int32_t* k = a.codes + row * code::kCount;
  const A* x = read_tile(a.x, t, n, first, length, b.x);
  A* out = b.out;
  const A of_x = c[column::kX];
  for (int64_t i = 0; i < size; ++i) out[i] = of_x * x[i];

  const View no_slot{};
  const auto slot = [&](int64_t j) {
    View v = a.history;
    with_dtype(v.dtype, [&](auto type) { v.data = static_cast<decltype(type)*>(v.data) + j * a.slot_stride; });
    return v;
  };
  const A skip = c[column::kSkip], of_f = c[column::kOut], of_d = c[column::kD], of_clip = c[column::kDClip];
  const int32_t keep = a.f && k[code::kSaveD] >= 0 && k[code::kSaveD] < a.slots ? k[code::kSaveD] : -1;
  const View kept_at = keep >= 0 ? slot(keep) : no_slot;
  if (a.f && (of_d != 0 || of_clip != 0 || keep >= 0)) {
    const A* f = read_tile(a.f, t, n, first, length, b.f);
    const bool clipped = k[code::kSaveClipped] == 1;
    for (int64_t i = 0; i < size; ++i) {
      const A d = skip * x[i] + of_f * f[i], dc = clip(d);
      out[i] += of_d * d + of_clip * dc;
      b.kept[i] = clipped ? dc : d;
    }
  }
  if (a.saved && c[column::kSaved] != 0)
    accumulate(out, c[column::kSaved], read_tile(a.saved, t, n, first, length, b.other), size);
  for (int64_t j = 0; j < a.slots && j < kHistory; ++j)
    if (c[column::kH0 + j] != 0) accumulate(out, c[column::kH0 + j], read_tile(slot(j), t, n, first, length, b.other), size);
  for (int j = 0; j < 2; ++j) {
    if (c[column::kN1 + j] == 0) continue;
    noise_tile(stream_of(a.seeds[n], static_cast<uint32_t>(k[code::kDraw1 + j]), kDomainStep), t, first, length, b.z);
    accumulate(out, c[column::kN1 + j], static_cast<const float*>(b.z), size);
  }

  if (a.saved && k[code::kSaveX] == 1) write_tile(a.saved, t, n, first, length, x);
  if (keep >= 0) write_tile(kept_at, t, n, first, length, static_cast<const A*>(b.kept));
  write_tile(a.x, t, n, first, length, static_cast<const A*>(out));
  const A next_in = c[column::kNextIn];
  for (int64_t i = 0; i < size; ++i) out[i] *= next_in;
  write_tile(a.net_in, t, n, first, length, static_cast<const A*>(out));
}

// A sample is one run where all tensors are contiguous, or all channels-last and no row makes noise.
template <class A> bool one_run(const DenoiseStep& a) {
  const View* views[] = {&a.x, &a.f, &a.saved, &a.net_in, &a.history};
  bool flat = true, rows = true;
  for (const View* v : views) {
    if (!*v || (v == &a.history && a.slots == 0)) continue;
    flat = flat && is_flat(*v, a.c, a.s);
    rows = rows && is_dense_rows(*v, a.c, a.s);
  }
  for (int64_t n = 0; rows && n < (a.row_per_sample ? a.n : 1); ++n) {
    const A* c = static_cast<const A*>(a.coefficients) + a.row[n] * column::kCount;
    rows = c[column::kN1] == 0 && c[column::kN2] == 0;
  }
  return flat || rows;
}

template <class A> void step_all(DenoiseStep a) {
  const bool run = one_run<A>(a);
  if (run) a.x = as_run(a.x), a.f = as_run(a.f), a.saved = as_run(a.saved), a.net_in = as_run(a.net_in), a.history = as_run(a.history);
  const Tiling tiling(a.c, a.s, run);
  const int64_t room = tiling.channels * tiling.length;
  parallel_for(a.n * tiling.count, 4, [&](int64_t begin, int64_t end) {
    const Scratch memory(room * (5 * sizeof(A) + sizeof(float)));
    A* m = reinterpret_cast<A*>(memory.data);
    const Buffers<A> buffers{m, m + room, m + 2 * room, m + 3 * room, m + 4 * room, reinterpret_cast<float*>(m + 5 * room)};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task % tiling.count;
      step_tile<A>(a, tiling, task / tiling.count, tile * tiling.length, tiling.length_of(tile), buffers);
    }
  });
}

inline void denoise_step(const DenoiseStep& a) { a.x.dtype == Dtype::f64 ? step_all<double>(a) : step_all<float>(a); }

#endif

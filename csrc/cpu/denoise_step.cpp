// denoise_step: one row of a plan, tile by tile, each tile in one loop from the tensors' own memory and types to theirs
// wherever layouts allow. What a row's coefficients do not need is not read, noise included. Formula:
// fastdiff/ops/denoise_step.py.
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

#define FD_LAMBDA __attribute__((always_inline))

// A row's terms on one tile. A: the type that is computed in; T: the network's. Null or zero: absent.
template <class A, class T> struct Terms {
  const A *x = nullptr, *past[1 + kHistory], *z[2] = {};
  const T *f = nullptr, *f_u = nullptr, *v = nullptr;
  A *out = nullptr, *saved = nullptr, *kept = nullptr;  // receive x', x and D or Dc
  T* next = nullptr;
  int pasts = 0;
  bool clipped = false;
  A of_x = 0, skip = 0, of_f = 0, guide = 0, of_d = 0, of_clip = 0, of_past[1 + kHistory], of_z[2] = {};
  A n_v = 0, scale = 0, shift = 0, next_in = 0;  // learned deviation n_v exp(scale V + shift)

  void add(A amount, const A* values) { of_past[pasts] = amount, past[pasts++] = values; }
};

// NaN stays.
template <class V> FD_INLINE V clip(V d) {
  d = d < -1 ? splat<V>(decltype(d[0] + 0)(-1)) : d;
  return d > 1 ? splat<V>(decltype(d[0] + 0)(1)) : d;
}

// Elements i ... of the tile. MORE: terms beyond x, F and the first noise exist.
template <bool MORE, class A, class T, class Get, class Put>
FD_INLINE void combine_vector(const Terms<A, T>& t, int64_t i, Get get, Put put) {
  typedef Vec<A> V;
  const V x = get(t.x + i);
  V out = t.of_x * x, kept{};
  if (t.f) {
    V f = get(t.f + i);
    if (MORE && t.f_u) f += t.guide * (f - get(t.f_u + i));
    const V d = t.skip * x + t.of_f * f, dc = clip(d);
    out += t.of_d * d + t.of_clip * dc;
    if (MORE) kept = t.clipped ? dc : d;
  }
  if constexpr (MORE) {
    for (int j = 0; j < t.pasts; ++j) out += t.of_past[j] * get(t.past[j] + i);
    if (t.v) out += t.n_v * exponential(t.scale * get(t.v + i) + t.shift) * get(t.z[0] + i);
    if (t.z[1]) out += t.of_z[1] * get(t.z[1] + i);
  }
  if (t.z[0]) out += t.of_z[0] * get(t.z[0] + i);
  if constexpr (MORE) {
    if (t.saved) put(t.saved + i, x);
    if (t.kept) put(t.kept + i, kept);
  }
  put(t.out + i, out);
  put(t.next + i, t.next_in * out);
}

template <bool MORE, class A, class T> void combine(const Terms<A, T>& t, int64_t size) {
  constexpr int64_t N = Simd<A>::N;
  int64_t i = 0;
  for (; i + N <= size; i += N)
    combine_vector<MORE>(t, i, [](const auto* p) FD_LAMBDA { return load(p); },
                         [](auto* p, Vec<A> v) FD_LAMBDA { store(p, v); });
  if (const int rest = static_cast<int>(size - i))
    combine_vector<MORE>(t, i, [rest](const auto* p) FD_LAMBDA { return load_some(p, rest); },
                         [rest](auto* p, Vec<A> v) FD_LAMBDA { store_some(p, v, rest); });
}

// Hands out tile-sized pieces of a task's memory.
struct Room {
  char* next;
  int64_t bytes;
  template <class S> S* take() {
    char* p = next;
    next += bytes;
    return reinterpret_cast<S*>(p);
  }
};
// Most that one tile takes: x F F_u V saved, 4 slots, kept, out, next, z_1 z_2, 2 for float noise
constexpr int kBuffers = 16;

inline View slot(const DenoiseStep& a, int64_t j) {
  View v = a.history;
  v.data = static_cast<char*>(v.data) + j * a.slot_stride * (v.dtype == Dtype::f64 ? 8 : 4);
  return v;
}

template <class A>
const A* noise(const DenoiseStep& a, const Tiling& t, int64_t n, uint32_t draw, int64_t first, int64_t length, Room& room) {
  float *z = room.take<float>(), *scratch = room.take<float>();
  noise_tile(stream_of(a.seeds[n], draw, kDomainStep), t, first, length, z, scratch);
  if constexpr (std::is_same_v<A, float>) {
    room.next -= room.bytes;  // scratch is free again
    return z;
  } else {
    A* wide = reinterpret_cast<A*>(scratch);
    for (int64_t i = 0; i < t.channels * length; ++i) wide[i] = z[i];
    return wide;
  }
}

template <class A, class T>
void step_tile(const DenoiseStep& a, const Tiling& t, int64_t n, int64_t first, int64_t length, Room room) {
  const int64_t row = a.row[a.row_per_sample ? n : 0], size = t.channels * length;
  const A* c = static_cast<const A*>(a.coefficients) + row * column::kCount;
  const int32_t* k = a.codes + row * code::kCount;
  const auto read = [&](const View& v, auto type) {
    typedef decltype(type) S;
    return read_tile(v, t, n, first, length, room.take<S>());
  };
  const auto target = [&](const View& v, auto type) {
    typedef decltype(type) S;
    S* here = in_place<S>(v, t, n, first);
    return here ? here : room.take<S>();
  };
  Terms<A, T> m;
  m.x = read(a.x, A{}), m.of_x = c[column::kX], m.next_in = c[column::kNextIn];
  m.skip = c[column::kSkip], m.of_f = c[column::kOut], m.of_d = c[column::kD], m.of_clip = c[column::kDClip];
  const int32_t keep = a.f && k[code::kSaveD] >= 0 && k[code::kSaveD] < a.slots ? k[code::kSaveD] : -1;
  if (a.f && (m.of_d != 0 || m.of_clip != 0 || keep >= 0)) {
    m.f = read(a.f, T{}), m.clipped = k[code::kSaveClipped] == 1;
    if (a.f_u) m.guide = c[column::kGuide] * (static_cast<const A*>(a.guidance)[a.guidance_per_sample ? n : 0] - 1);
    if (m.guide != 0) m.f_u = read(a.f_u, T{});
  }
  if (a.saved && c[column::kSaved] != 0) m.add(c[column::kSaved], read(a.saved, A{}));
  for (int64_t j = 0; j < a.slots && j < kHistory; ++j)
    if (c[column::kH0 + j] != 0) m.add(c[column::kH0 + j], read(slot(a, j), A{}));
  if (a.v && c[column::kNV] != 0) {
    m.v = read(a.v, T{}), m.n_v = c[column::kNV];
    m.scale = (c[column::kLogMax] - c[column::kLogMin]) / 4, m.shift = (c[column::kLogMax] + c[column::kLogMin]) / 4;
  }
  for (int j = 0; j < 2; ++j) {
    m.of_z[j] = c[column::kN1 + j];
    if (m.of_z[j] != 0 || (j == 0 && m.v))
      m.z[j] = noise<A>(a, t, n, static_cast<uint32_t>(k[code::kDraw1 + j]), first, length, room);
  }
  const bool save = a.saved && k[code::kSaveX] == 1;
  if (save) m.saved = target(a.saved, A{});
  if (keep >= 0) m.kept = target(slot(a, keep), A{});
  m.out = target(a.x, A{}), m.next = target(a.net_in, T{});

  m.f_u || m.v || m.pasts || m.z[1] || save || keep >= 0 ? combine<true>(m, size) : combine<false>(m, size);

  const auto write = [&](const View& v, int64_t at, const auto* from) { write_tile(v, t, at, first, length, from); };
  if (save) write(a.saved, n, m.saved);
  if (keep >= 0) write(slot(a, keep), n, m.kept);
  write(a.x, n, m.out);
  for (int64_t i = 0; i < a.copies; ++i) write(a.net_in, i * a.n + n, m.next);
}

template <class A> bool makes_noise(const DenoiseStep& a) {
  for (int64_t n = 0; n < (a.row_per_sample ? a.n : 1); ++n) {
    const A* c = static_cast<const A*>(a.coefficients) + a.row[n] * column::kCount;
    if (c[column::kN1] != 0 || c[column::kN2] != 0 || (a.v && c[column::kNV] != 0)) return true;
  }
  return false;
}

template <class A, class T> void step_all(DenoiseStep a) {
  View* views[] = {&a.x, &a.f, &a.f_u, &a.v, &a.saved, &a.net_in, &a.history};
  bool flat = true, rows = true;
  for (const View* v : views) {
    flat = flat && (!*v || is_flat(*v, a.c, a.s));
    rows = rows && (!*v || is_dense_rows(*v, a.c, a.s));
  }
  const Walk walk = flat || (rows && !makes_noise<A>(a)) ? Walk::run : rows ? Walk::pixels : Walk::tiles;
  if (walk != Walk::tiles)
    for (View* v : views) *v = as_run(*v);
  const Tiling tiling(a.c, a.s, walk);
  const int64_t bytes = tiling.channels * tiling.length * static_cast<int64_t>(sizeof(A));
  parallel_for(a.n * tiling.count, 4, [&](int64_t begin, int64_t end) {
    const Scratch memory(kBuffers * bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task % tiling.count;
      step_tile<A, T>(a, tiling, task / tiling.count, tile * tiling.length, tiling.length_of(tile),
                      Room{memory.data, bytes});
    }
  });
}

// The network's type is read and written as it is where all its tensors share it, else by way of float or double.
inline void denoise_step(const DenoiseStep& a) {
  if (a.x.dtype == Dtype::f64) return step_all<double, double>(a);
  Dtype network = a.net_in.dtype;
  for (const View* v : {&a.f, &a.f_u, &a.v})
    if (*v && v->dtype != network) network = Dtype::f32;
  network == Dtype::bf16  ? step_all<float, bfloat16>(a)
  : network == Dtype::f16 ? step_all<float, float16>(a)
                          : step_all<float, float>(a);
}

#endif

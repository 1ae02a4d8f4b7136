// Tiles of a tensor [n, c, s]: all channels of a run of pixels, as [c][length] whatever the tensor's layout. A thread's tile
// of noise then computes no Philox block twice. Include inside a kernel file, after simd.h and noise.h.

constexpr int64_t kTile = 4096;  // elements: a few of these stay in L1 and L2

// How a sample's elements are walked: in logical order, by [c][length] tiles; as one run of memory, which is that order; or
// as one run of memory in which the channels of a pixel are neighbours.
enum class Walk { tiles, run, pixels };

struct Tiling {
  Walk walk;
  int64_t c, channels, pixels, length, count;  // pixels of a tile, tiles of a sample
  Tiling(int64_t c_, int64_t s, Walk w)
      : walk(w), c(c_), channels(w == Walk::tiles ? c : 1), pixels(w == Walk::tiles ? s : c * s) {
    const int64_t unit = w == Walk::run ? 64 : 64 * (c > 0 ? c : 1);  // elements of 64 pixels: whole Philox vectors
    const int64_t blocks = kTile / unit;
    length = (blocks > 0 ? blocks : 1) * (w == Walk::tiles ? 64 : unit);
    count = (pixels + length - 1) / length;
  }
  int64_t length_of(int64_t tile) const { return pixels - tile * length < length ? pixels - tile * length : length; }
};

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float> ? Dtype::f32 : std::is_same_v<T, bfloat16> ? Dtype::bf16
                         : std::is_same_v<T, float16> ? Dtype::f16 : Dtype::f64;

// Between a run of the tensor's type T and a tile of S: T itself, or the type that is computed in.
template <class S, class T> FD_INLINE void read_run(const T* p, int64_t stride, int64_t n, S* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<S, T>) {
    if (stride == 1) return static_cast<void>(std::memcpy(out, p, n * sizeof(T)));
    for (; i < n; ++i) out[i] = p[i * stride];
  } else if constexpr (std::is_floating_point_v<S>) {
    if constexpr (std::is_same_v<S, Acc<T>>)
      if (stride == 1)
        for (; i + Simd<S>::N <= n; i += Simd<S>::N) store(out + i, load(p + i));
    for (; i < n; ++i) out[i] = static_cast<S>(to_float(p[i * stride]));
  }
}
template <class S, class T> FD_INLINE void write_run(T* p, int64_t stride, int64_t n, const S* in) {
  int64_t i = 0;
  if constexpr (std::is_same_v<S, T>) {
    if (stride == 1) return static_cast<void>(std::memcpy(p, in, n * sizeof(T)));
    for (; i < n; ++i) p[i * stride] = in[i];
  } else if constexpr (std::is_floating_point_v<S>) {
    if constexpr (std::is_same_v<S, Acc<T>>)
      if (stride == 1)
        for (; i + Simd<S>::N <= n; i += Simd<S>::N) store(p + i, load(in + i));
    for (; i < n; ++i) p[i * stride] = from_float<T>(static_cast<Acc<T>>(in[i]));
  }
}

// The same for all C channels of n pixels that lie pixel by pixel; C is known, so that compilers make shuffles of it.
template <int C, class S> void split_pixels(const S* __restrict p, int64_t n, S* __restrict out) {
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) out[c * n + i] = p[i * C + c];
}
template <int C, class S> void join_pixels(S* __restrict p, int64_t n, const S* __restrict in) {
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) p[i * C + c] = in[c * n + i];
}
// What GCC shuffles: it does not vectorise copies of structures.
template <class S> using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, S>;
// f(integral constant C) where the tensor is of such pixels with 2, 3 or 4 channels.
template <class F> bool with_pixels(const View& v, const Tiling& t, F&& f) {
  if (v.c != 1 || v.s != t.channels) return false;
  if (t.channels == 3) return f(std::integral_constant<int, 3>{}), true;
  if (t.channels == 4) return f(std::integral_constant<int, 4>{}), true;
  if (t.channels == 2) return f(std::integral_constant<int, 2>{}), true;
  return false;
}

// Where the tile already lies in memory as S[length]; null where it has to be copied.
template <class S> S* in_place(const View& v, const Tiling& t, int64_t n, int64_t first) {
  return v.dtype == kDtype<S> && t.channels == 1 && v.s == 1 ? v.at<S>(n, 0, first) : nullptr;
}

// The tile as S[channels][length], in `scratch` unless it lies so in memory. S: the tensor's type, float or double.
template <class S> const S* read_tile(const View& v, const Tiling& t, int64_t n, int64_t first, int64_t length, S* scratch) {
  if (const S* here = in_place<S>(v, t, n, first)) return here;
  with_dtype(v.dtype, [&](auto type) {
    typedef decltype(type) T;
    if constexpr (std::is_same_v<S, T>)
      if (with_pixels(v, t, [&](auto c) {
            split_pixels<c.value>(v.at<const Bits<T>>(n, 0, first), length, reinterpret_cast<Bits<T>*>(scratch));
          }))
        return;
    for (int64_t c = 0; c < t.channels; ++c) read_run(v.at<const T>(n, c, first), v.s, length, scratch + c * length);
  });
  return scratch;
}
template <class S> void write_tile(const View& v, const Tiling& t, int64_t n, int64_t first, int64_t length, const S* in) {
  if (in_place<S>(v, t, n, first) == in) return;
  with_dtype(v.dtype, [&](auto type) {
    typedef decltype(type) T;
    if constexpr (std::is_same_v<S, T>)
      if (with_pixels(v, t, [&](auto c) {
            join_pixels<c.value>(v.at<Bits<T>>(n, 0, first), length, reinterpret_cast<const Bits<T>*>(in));
          }))
        return;
    for (int64_t c = 0; c < t.channels; ++c) write_run(v.at<T>(n, c, first), v.s, length, in + c * length);
  });
}

// The tile's noise: elements are numbered in logical order, channel times all pixels plus pixel. `scratch` [length], for
// pixels.
inline void noise_tile(const Stream& s, const Tiling& t, int64_t first, int64_t length, float* out, float* scratch) {
  if (t.walk != Walk::pixels) {
    for (int64_t c = 0; c < t.channels; ++c) noise_run(s, c * t.pixels + first, length, out + c * length);
    return;
  }
  const int64_t n = length / t.c;
  for (int64_t c = 0; c < t.c; ++c) {
    noise_run(s, c * (t.pixels / t.c) + first / t.c, n, scratch);
    for (int64_t i = 0; i < n; ++i) out[i * t.c + c] = scratch[i];
  }
}

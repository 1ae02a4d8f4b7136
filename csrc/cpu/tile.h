// Tiles of a tensor [n, c, s]: all channels of a run of pixels, as float or double [c][length] whatever the tensor's type
// and layout. A thread's tile of noise then computes no Philox block twice. Include inside a kernel file, after simd.h.

constexpr int64_t kTile = 4096;  // elements: a few of these stay in L1 and L2

struct Tiling {
  int64_t channels, pixels, length, count;  // pixels of a tile, tiles of a sample
  // `flat`: memory order is element order (or the order does not matter), so a sample is one run.
  Tiling(int64_t c, int64_t s, bool flat) : channels(flat ? 1 : c), pixels(flat ? c * s : s) {
    const int64_t blocks = kTile / (64 * (channels > 0 ? channels : 1));  // of 64 pixels: whole Philox vectors
    length = 64 * (blocks > 0 ? blocks : 1);
    count = (pixels + length - 1) / length;
  }
  int64_t length_of(int64_t tile) const { return pixels - tile * length < length ? pixels - tile * length : length; }
};

template <class A, class T> FD_INLINE void read_run(const T* p, int64_t stride, int64_t n, A* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<A, Acc<T>>) {
    if (stride == 1)
      for (; i + Simd<A>::N <= n; i += Simd<A>::N) store(out + i, load(p + i));
  }
  for (; i < n; ++i) out[i] = static_cast<A>(to_float(p[i * stride]));
}
template <class A, class T> FD_INLINE void write_run(T* p, int64_t stride, int64_t n, const A* in) {
  int64_t i = 0;
  if constexpr (std::is_same_v<A, Acc<T>>) {
    if (stride == 1)
      for (; i + Simd<A>::N <= n; i += Simd<A>::N) store(p + i, load(in + i));
  }
  for (; i < n; ++i) p[i * stride] = from_float<T>(static_cast<Acc<T>>(in[i]));
}

// The tile as A[channels][length], in `scratch` unless the tensor already is that.
template <class A> const A* read_tile(const View& v, const Tiling& t, int64_t n, int64_t first, int64_t length, A* scratch) {
  return with_dtype(v.dtype, [&](auto type) -> const A* {
    typedef decltype(type) T;
    if constexpr (std::is_same_v<A, T>)
      if (t.channels == 1 && v.s == 1) return v.at<const A>(n, 0, first);
    for (int64_t c = 0; c < t.channels; ++c) read_run(v.at<const T>(n, c, first), v.s, length, scratch + c * length);
    return scratch;
  });
}
template <class A> void write_tile(const View& v, const Tiling& t, int64_t n, int64_t first, int64_t length, const A* in) {
  with_dtype(v.dtype, [&](auto type) {
    typedef decltype(type) T;
    for (int64_t c = 0; c < t.channels; ++c) write_run(v.at<T>(n, c, first), v.s, length, in + c * length);
  });
}

// The tile's noise: elements are numbered in logical order, channel times all pixels plus pixel.
FD_INLINE void noise_tile(const Stream& s, const Tiling& t, int64_t first, int64_t length, float* out) {
  for (int64_t c = 0; c < t.channels; ++c) noise_run(s, c * t.pixels + first, length, out + c * length);
}

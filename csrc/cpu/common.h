// What kernels and csrc/bridge share: storage types, tensors as raw pointers, threads. No torch headers.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff {

enum class Dtype { f32, bf16, f16, f64 };

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// The type that values of storage type T are computed in.
template <class T> using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From> To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To t;
  std::memcpy(&t, &v, sizeof t);
  return t;
}

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }
inline float to_float(bfloat16 v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(float16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7FFFu;
  // Exponent and mantissa moved into place are 2^112 too small, subnormals included; infinity and NaN are set apart.
  const float magnitude = bits_as<float>(rest << 13) * 5.192296858534828e33f;
  const uint32_t bits = rest >= 0x7C00u ? 0x7F800000u | (rest << 13) : bits_as<uint32_t>(magnitude);
  return bits_as<float>(sign | bits);
}

template <class T> T from_float(Acc<T> v) { return v; }
template <> inline bfloat16 from_float<bfloat16>(float v) {
  const uint32_t u = bits_as<uint32_t>(v);
  return {static_cast<uint16_t>(v == v ? (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u)};
}
template <> inline float16 from_float<float16>(float v) {
  const uint32_t u = bits_as<uint32_t>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  uint32_t h;
  if (magnitude > 0x7F800000u) h = 0x7E00u;             // NaN
  else if (magnitude >= 0x477FF000u) h = 0x7C00u;       // rounds to 65536 or more
  else if (magnitude >= 0x38800000u) h = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  else h = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;  // subnormal: the sum rounds at 2^-24
  return {static_cast<uint16_t>(sign | h)};
}

// A tensor [N, C, S] (S: all spatial dimensions, which share one stride), strides in elements.
struct View {
  void* data = nullptr;
  int64_t n = 0, c = 0, s = 0;  // strides
  Dtype dtype = Dtype::f32;
  explicit operator bool() const { return data != nullptr; }
  template <class T> T* at(int64_t in, int64_t ic = 0, int64_t is = 0) const {
    return static_cast<T*>(data) + in * n + ic * c + is * s;
  }
};

// Memory order is element order; or it is pixel by pixel without gaps.
inline bool is_flat(const View& v, int64_t c, int64_t s) { return (c <= 1 || v.c == s) && (s <= 1 || v.s == 1); }
inline bool is_dense_rows(const View& v, int64_t c, int64_t s) { return (c <= 1 || v.c == 1) && (s <= 1 || v.s == c); }

// A sample of such a view as one run of elements.
inline View as_run(View v) {
  v.c = 0, v.s = 1;
  return v;
}

template <class F> auto with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bfloat16{});
    case Dtype::f16: return f(float16{});
    default: return f(double{});
  }
}

// body(begin, end) over [0, n), at least `grain` items a thread; defined in bridge/threads.cpp with torch's thread pool.
void parallel_for_raw(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int64_t threads();

template <class F> void parallel_for(int64_t n, int64_t grain, const F& body) {
  if (n <= 0) return;
  parallel_for_raw(n, grain < 1 ? 1 : grain,
                   [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
                   const_cast<void*>(static_cast<const void*>(&body)));
}

// Memory for the length of a block, aligned for vectors. Not a template: no copy of it may belong to one instruction set.
struct Scratch {
  char* data;
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Instruction set in use, an index into kIsaNames.
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
int best_isa();
extern std::atomic<int> isa;

}  // namespace fastdiff

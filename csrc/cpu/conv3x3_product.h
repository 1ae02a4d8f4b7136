// The products behind Winograd's transforms: rows of pixels' tiles times a panel of packed weights, lanes are output
// channels. Include inside a kernel file, after simd.h. A sum's order depends on its length alone.

constexpr int64_t kDepth = 256;        // words summed in registers: a panel of so many rows stays in L2
constexpr int64_t kFilterDepth = 128;  // the same where a row of points has to

// A word is a float, or two neighbouring bfloat16 of the summed dimension. A kernel's sums take kRows x kVectors registers.
struct Floats {
  typedef float Stored;
  static constexpr int step = 1;
#if FASTDIFF_LEVEL >= 2
  static constexpr int kRows = 6, kVectors = 4;  // 24 sums, 4 weights and a broadcast in 32 registers
#elif FASTDIFF_LEVEL == 1
  static constexpr int kRows = 6, kVectors = 2;  // 12 sums in 16 registers
#else
  static constexpr int kRows = 4, kVectors = 2;
#endif
  static FD_INLINE vf multiply_add(vf a, vf b, vf sum) { return fma(a, b, sum); }
  static FD_INLINE void keep(float* p, vf v) { store(p, v); }
};
#if FASTDIFF_LEVEL >= 3
struct Pairs {
  typedef bfloat16 Stored;
  static constexpr int step = 2, kRows = 6, kVectors = 4;
  static FD_INLINE vf multiply_add(vf a, vf b, vf sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static FD_INLINE void keep(bfloat16* p, vf v) { store(p, v); }
};
#endif

// m [R rows, J vectors] = v [R, words] u [words, J vectors], or m += that; strides in floats, all words of 4 bytes.
// Touches what lies from `ahead` on for L2, `ahead_stride` floats further at each word.
template <class Op, int R, int J>
__attribute__((noinline)) void multiply(const float* v, int64_t v_stride, const float* u, int64_t u_stride, int64_t words,
                                        float* m, int64_t m_stride, bool more, const float* ahead,
                                        int64_t ahead_stride) {
  vf sum[R][J];
  if (more) each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) { sum[r][j] = load(m + r * m_stride + j * W); });
  });
  else each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) { sum[r][j] = vf{}; });
  });
  for (int64_t k = 0; k < words; ++k, u += u_stride, ahead += ahead_stride) {
    vf b[J];
    each<J>([&](int j) __attribute__((always_inline)) { b[j] = load(u + j * W); });
    __builtin_prefetch(ahead, 0, 2);
    each<R>([&](int r) __attribute__((always_inline)) {
      const vf a = splat<vf>(v[r * v_stride + k]);
      each<J>([&](int j) __attribute__((always_inline)) { sum[r][j] = Op::multiply_add(a, b[j], sum[r][j]); });
    });
  }
  each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) { store(m + r * m_stride + j * W, sum[r][j]); });
  });
}

typedef void (*Multiply)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool, const float*,
                         int64_t);

// The kernels by vectors and rows, both from 1 on.
template <class Op, int... i> constexpr auto kernels_of(std::integer_sequence<int, i...>) {
  struct { Multiply at[sizeof...(i)]; } table{{&multiply<Op, i % Op::kRows + 1, i / Op::kRows + 1>...}};
  return table;
}
template <class Op> FD_INLINE Multiply multiply_of(int rows, int vectors) {
  static constexpr auto table = kernels_of<Op>(std::make_integer_sequence<int, Op::kRows * Op::kVectors>{});
  return table.at[(vectors - 1) * Op::kRows + rows - 1];
}

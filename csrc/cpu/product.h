// Matrix products of panels: lanes are pixels. Include inside a kernel file, after simd.h.
//
// A panel holds `words` rows of kLanes pixels; a word is one number, or two neighbouring bfloat16 of the summed dimension.
// The other operand's words are broadcast, one row of the result each. The order of a sum depends on its length alone,
// so a result depends on nothing but its own row and pixel.

#if FASTDIFF_LEVEL >= 2
constexpr int kTileRows = 8;  // 16 sums in 32 registers: enough to hide the latency, and rows need not be packed
#elif FASTDIFF_LEVEL == 1
constexpr int kTileRows = 6;  // 12 sums in 16 registers
#else
constexpr int kTileRows = 4;
#endif
constexpr int kVectors = 2;
// Words summed one after the other: rounding grows with a run's length, then with their number
constexpr int64_t kRun = 128;

template <class A> struct Plain {
  typedef A Stored;
  typedef A Word;
  typedef Vec<A> V;
  static constexpr int step = 1;
  static FD_INLINE V multiply_add(Word a, V b, V sum) { return fma(splat<V>(a), b, sum); }
  static FD_INLINE V word(V first, V) { return first; }
};

#if FASTDIFF_LEVEL >= 3
struct Pairs {
  typedef bfloat16 Stored;
  typedef float Word;  // the bits of two bfloat16
  typedef vf V;
  static constexpr int step = 2;
  static FD_INLINE V multiply_add(Word a, V b, V sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(splat<vf>(a)), reinterpret_cast<__m512bh>(b));
  }
  static FD_INLINE V word(V first, V second) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
    return reinterpret_cast<vf>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

template <class Op> constexpr int kLanes = kVectors * Simd<typename Op::Word>::N;

template <class Op> struct Tile {
  typedef typename Op::V V;
  typedef typename Op::Stored Stored;
  typedef typename Op::Word Word;
  static constexpr int N = Simd<Word>::N;
  V sum[kTileRows][kVectors];

  // sum = a panel. packed: a is [words][kTileRows] words, else `rows` rows of `stride` elements (the last stands in
  // for more).
  template <bool packed>
  FD_INLINE void product(const Stored* a, int64_t stride, int rows, const Word* panel, int64_t words) {
    const Stored* row[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      row[i] = packed ? a + i * Op::step : a + (i < rows ? i : rows - 1) * stride;
      for (int j = 0; j < kVectors; ++j) sum[i][j] = V{};
    }
    for (int64_t first = 0; first < words; first += kRun) {
      const int64_t last = first + kRun < words ? first + kRun : words;
      V run[kTileRows][kVectors] = {};
      for (int64_t k = first; k < last; ++k) {
        V b[kVectors];
        for (int j = 0; j < kVectors; ++j) b[j] = load(panel + k * kLanes<Op> + j * N);
        for (int i = 0; i < kTileRows; ++i) {
          Word w;
          __builtin_memcpy(&w, (packed ? a + (k * kTileRows + i) * Op::step : row[i] + k * Op::step), sizeof w);
          for (int j = 0; j < kVectors; ++j) run[i][j] = Op::multiply_add(w, b[j], run[i][j]);
        }
      }
      for (int i = 0; i < kTileRows; ++i)
        for (int j = 0; j < kVectors; ++j) sum[i][j] += run[i][j];
    }
  }

  FD_INLINE V word(int i, int j) const { return Op::word(sum[i][j], sum[i + Op::step - 1][j]); }
};

// Square of N vectors: element j of vector i becomes element i of vector j.
template <class A> FD_INLINE void transpose(Vec<A>* r) {
  constexpr int N = Simd<A>::N;
  typedef std::conditional_t<sizeof(A) == 8, vq, vu> Mask;
#pragma GCC unroll 4
  for (int half = N / 2; half > 0; half /= 2) {
    Mask low, high;
    for (int j = 0; j < N; ++j) low[j] = j & half ? N + j - half : j, high[j] = j & half ? N + j : j + half;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & half) continue;
      const Vec<A> a = r[i], b = r[i + half];
      r[i] = __builtin_shuffle(a, b, low), r[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

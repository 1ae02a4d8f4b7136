// The products behind Winograd's transforms, and of conv1x1: rows of tiles or pixels times a panel of packed weights, lanes are
// output channels. Include inside a kernel file, after simd.h. A sum's order depends on its length alone.

FD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FD_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FD_INLINE int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

constexpr int64_t kDepth = 256;  // words summed in registers: a panel of so many rows stays in L2
constexpr int64_t kShared = 64;  // channels that are summed as integers, in one unit
constexpr int64_t kSome = 64;    // words of which filters are evaluated together, see Evaluated
constexpr int64_t kLine = 16;    // floats of a cache line
constexpr int kLanes = 4;        // neighbouring channels in the V of multiply_filters

// Of V: matrices [tiles, channels]; what multiply_filters reads; [channels / W, tiles, kIn, W] for each row of points.
enum class Order { matrices, groups, columns, chunks };

// A word is a float, or two neighbouring bfloat16 of the summed dimension. A kernel's sums take kRows x kVectors registers.
struct Floats {
  typedef float Stored;
  static constexpr Order kOrder = Order::matrices;
  typedef vf Sum;
  static constexpr bool kFilters = false, kEvaluates = false, kScaled = false;
  static constexpr int64_t kBlock = 64;  // output channels of a block of packed weights; the last one is a multiple of kUnit
  static constexpr int step = 1, kGroup = 1;
#if FASTDIFF_LEVEL >= 2
  static constexpr int kRows = 6, kVectors = 4;  // 24 sums, 4 weights and a broadcast in 32 registers
#elif FASTDIFF_LEVEL == 1
  static constexpr int kRows = 6, kVectors = 2;  // 12 sums in 16 registers
#else
  static constexpr int kRows = 4, kVectors = 2;
#endif
  static FD_INLINE vf multiply_add(vf a, vf b, vf sum) { return fma(a, b, sum); }
  static FD_INLINE void keep(float* p, vf v, int64_t) { store(p, v); }
};
#if FASTDIFF_LEVEL >= 3
struct Pairs {
  typedef bfloat16 Stored;
  static constexpr Order kOrder = Order::matrices;
  typedef vf Sum;
  static constexpr bool kFilters = false, kEvaluates = false, kScaled = false;
  static constexpr int64_t kBlock = 64;
  static constexpr int step = 2, kGroup = 1, kRows = 6, kVectors = 4;
  static FD_INLINE vf multiply_add(vf a, vf b, vf sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static FD_INLINE void keep(bfloat16* p, vf v, int64_t) { store(p, v); }
};
#endif
#if FASTDIFF_LEVEL >= 1
// Two neighbouring 16-bit integers: values of U over a unit of the output channel's, of V over one of kShared channels of a
// tile's row of points. The sum of these channels is exact: |V| is below 2^14, and |U| sums to less than 2^17 (_winograd.py).
struct Shorts : Floats {
  typedef int16_t Stored;
  typedef vi Sum;
  static constexpr Order kOrder = Order::chunks;
  static constexpr bool kScaled = true;
  static constexpr int step = 2;
  static constexpr float kLargest = 16380;  // of V; what is left of 2^14 is for float's roundings
  static FD_INLINE vi multiply_add(vf a, vf b, vi sum) {
#if FASTDIFF_LEVEL >= 3
    return reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a),
                                                    reinterpret_cast<__m512i>(b)));
#elif FASTDIFF_LEVEL == 2
    return sum + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
    return sum + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
  }
  static FD_INLINE void keep(int16_t* p, vf v, int64_t) {
#if FASTDIFF_LEVEL >= 2
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
#else
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i low = _mm256_castsi256_si128(i), high = _mm256_extracti128_si256(i, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
#endif
  }
};
#endif

// m [R rows, J vectors] = v [R, words] u [words, J vectors], plus `from` where it is not null: m itself, or one row for all;
// strides in floats, all words of 4 bytes. Sums of integers are multiplied by `scale` [R], others have none.
// Touches what lies from `ahead` on for L2, `ahead_stride` floats further at each word.
template <class Op, int R, int J>
__attribute__((noinline)) void multiply(const float* v, int64_t v_stride, const float* u, int64_t u_stride, int64_t words,
                                        const float* from, int64_t from_stride, float* m, int64_t m_stride,
                                        const float* scale, const float* ahead, int64_t ahead_stride) {
  typedef typename Op::Sum Sum;
  Sum sum[R][J];
  if (!Op::kScaled && from) each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) {
      sum[r][j] = reinterpret_cast<Sum>(load(from + r * from_stride + j * W));
    });
  });
  else each<R>([&](int r) __attribute__((always_inline)) {
    each<J>([&](int j) __attribute__((always_inline)) { sum[r][j] = Sum{}; });
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
    each<J>([&](int j) __attribute__((always_inline)) {
      float* to = m + r * m_stride + j * W;
      if constexpr (Op::kScaled) {
        const vf s = __builtin_convertvector(sum[r][j], vf), by = splat<vf>(scale[r]);
        store(to, from ? fma(s, by, load(from + r * from_stride + j * W)) : s * by);
      } else store(to, sum[r][j]);
    });
  });
}

typedef void (*Multiply)(const float*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t,
                         const float*, const float*, int64_t);

// The kernels by vectors and rows, both from 1 on.
template <class Op, int... i> constexpr auto kernels_of(std::integer_sequence<int, i...>) {
  struct { Multiply at[sizeof...(i)]; } table{{&multiply<Op, i % Op::kRows + 1, i / Op::kRows + 1>...}};
  return table;
}
template <class Op> FD_INLINE Multiply multiply_of(int rows, int vectors) {
  static constexpr auto table = kernels_of<Op>(std::make_integer_sequence<int, Op::kRows * Op::kVectors>{});
  return table.at[(vectors - 1) * Op::kRows + rows - 1];
}

// ---- weights kept as filters, for few tiles: their values at the points are computed where they are multiplied

// The same weights for many tiles where registers are few: a block of filters is evaluated before it is multiplied. With 12
// sums the kernel below waits for loads; this takes half its time from 16 tiles on, and as long at 4. The same bits.
struct Evaluated : Floats {
  static constexpr bool kEvaluates = true;
};
constexpr int64_t kMany = FASTDIFF_LEVEL >= 2 ? INT64_MAX : 6;  // tiles of a slab

// A group of kGroup tiles has V [words / kLanes, kGroup, kIn, kLanes] for each row of points.
struct Filters {
  typedef float Stored;
  static constexpr Order kOrder = Order::groups;
  static constexpr bool kFilters = true, kEvaluates = false, kScaled = false;
  static constexpr int64_t kBlock = kUnit;
  static constexpr int step = 1;
#if FASTDIFF_LEVEL >= 2
  static constexpr int kGroup = 4;  // 24 sums in 32 registers
#else
  static constexpr int kGroup = 2;  // 12 in 16
#endif
  // A vector of kLanes-tuples, one every `stride` floats.
  static FD_INLINE void keep(float* p, vf v, int64_t stride) {
    const auto piece = [&](auto i) __attribute__((always_inline)) {
      constexpr int at = decltype(i)::value * kLanes;
      const auto part = __builtin_shufflevector(v, v, at, at + 1, at + 2, at + 3);
      __builtin_memcpy(p + i * stride, &part, sizeof part);
    };
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (piece(std::integral_constant<int, i>{}), ...);
    }(std::make_integer_sequence<int, W / kLanes>{});
  }
  // Rows of points whose sums are taken at once: the fewer the tiles, the more.
  static constexpr int rows_at_once(int tiles) { return tiles == 1 && kGroup == 4 ? 3 : tiles * 2 <= kGroup ? 2 : 1; }
};

// m [count * kIn points, R tiles] = V u, or m += that, for W filters and `count` rows of points from `point` on, the same
// sums as multiply's. taps: [words, 9, kUnit], scaled as Scheme::filter wants them. Fetches `share` floats for every word
// from `ahead` on.
template <class Scheme, int R, int point>
__attribute__((noinline)) void multiply_filters(const float* v, int64_t v_row, const float* taps, int64_t words, float* m,
                                                int64_t m_plane, bool more, const float* ahead, int64_t share) {
  constexpr int kIn = Scheme::kIn, count = Filters::rows_at_once(R);
  vf sum[count][kIn][R];
  const auto all = [&](auto f) __attribute__((always_inline)) {
    each<count>([&](int i) __attribute__((always_inline)) {
      each<kIn>([&](int q) __attribute__((always_inline)) {
        each<R>([&](int r) __attribute__((always_inline)) { f(sum[i][q][r], m + (i * kIn + q) * m_plane + r * kUnit); });
      });
    });
  };
  if (more) all([](vf& s, float* at) __attribute__((always_inline)) { s = load(at); });
  else all([](vf& s, float*) __attribute__((always_inline)) { s = vf{}; });
  for (int64_t k = 0; k < words; ++k, taps += 9 * kUnit, ahead += share) {
    const float* from = v + k / kLanes * (kLanes * kIn * Filters::kGroup) + k % kLanes;
    each<(9 * count + kIn - 1) / kIn>([&](int i) __attribute__((always_inline)) {
      __builtin_prefetch(ahead + i * kLine, 0, 2);
    });
    each<count>([&](int i) __attribute__((always_inline)) {
      vf g[3], u[kIn];
      each<3>([&](int j) __attribute__((always_inline)) {
        const auto tap = [&](int row) __attribute__((always_inline)) { return load(taps + (3 * row + j) * kUnit); };
        g[j] = Scheme::filter_at(point + i, tap(0), tap(1), tap(2));
      });
      Scheme::filter(g[0], g[1], g[2], u);
      each<kIn>([&](int q) __attribute__((always_inline)) {
        each<R>([&](int r) __attribute__((always_inline)) {
          sum[i][q][r] = fma(splat<vf>(from[i * v_row + (r * kIn + q) * kLanes]), u[q], sum[i][q][r]);
        });
      });
    });
  }
  all([](vf& s, float* at) __attribute__((always_inline)) { store(at, s); });
}

typedef void (*MultiplyFilters)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool, const float*, int64_t);

// The kernel for `tiles` tiles, from 1 on, and rows of points from number `point` on.
template <class Scheme, int R, int... i>
MultiplyFilters filter_kernel(int point, std::integer_sequence<int, i...>) {
  constexpr int step = Filters::rows_at_once(R);
  static constexpr MultiplyFilters kernels[] = {&multiply_filters<Scheme, R, i * step>...};
  return kernels[point / step];
}
template <class Scheme> FD_INLINE MultiplyFilters multiply_filters_of(int tiles, int point) {
  const auto of = [&](auto R) {
    constexpr int r = decltype(R)::value;
    return filter_kernel<Scheme, r>(point, std::make_integer_sequence<int, Scheme::kIn / Filters::rows_at_once(r)>{});
  };
  switch (tiles) {
    case 1: return of(std::integral_constant<int, 1>{});
    case 2: return of(std::integral_constant<int, 2>{});
#if FASTDIFF_LEVEL >= 2
    case 3: return of(std::integral_constant<int, 3>{});
    default: return of(std::integral_constant<int, 4>{});
#endif
  }
  return nullptr;
}

// F(6, 3) at the points 0, infinity, +-1, +-2, +-1/2, and F(4, 3) at the first six of them, so that both multiply the same
// values of a filter; and these products. Include inside a kernel file, after conv3x3_product.h. As in conv3x3_transforms.h
// the filter is taken as it is, at +-1/2 times 4, and what is lacking of G is in the last transform.

template <int out> struct Nested;

// With M(x) = x (x^2 - 1) (x^2 - 4): B^T has the coefficients of M(x) / (x - p), and of M.
template <> struct Nested<4> {
  static FD_INLINE void input(const vf* d, vf* r) {
    const vf even1 = fma(splat<vf>(-4.0f), d[2], d[4]), odd1 = fma(splat<vf>(-4.0f), d[1], d[3]);
    const vf even2 = d[4] - d[2], odd2 = d[3] - d[1], twice = odd2 + odd2;
    r[0] = fma(splat<vf>(-5.0f), d[2], fma(splat<vf>(4.0f), d[0], d[4]));
    r[1] = fma(splat<vf>(-5.0f), d[3], fma(splat<vf>(4.0f), d[1], d[5]));
    r[2] = even1 + odd1, r[3] = even1 - odd1;
    r[4] = even2 + twice, r[5] = even2 - twice;
  }
  static FD_INLINE void output(const vf* m, vf* y) {
    const vf one = splat<vf>(-1.0f / 6), two = splat<vf>(1.0f / 24);
    const vf even1 = one * (m[2] + m[3]), odd1 = one * (m[2] - m[3]);
    const vf even2 = two * (m[4] + m[5]), odd2 = two * (m[4] - m[5]);
    y[0] = fma(splat<vf>(0.25f), m[0], even1 + even2);
    y[1] = fma(splat<vf>(2.0f), odd2, odd1);
    y[2] = fma(splat<vf>(4.0f), even2, even1);
    y[3] = fma(splat<vf>(8.0f), odd2, odd1) + m[1];
  }
};

// With M(x) = x (x^2 - 1) (x^2 - 4) (x^2 - 1/4).
template <> struct Nested<6> {
  static FD_INLINE void input(const vf* d, vf* r) {
    const vf even1 = fma(splat<vf>(-4.25f), d[4], d[2] + d[6]), odd1 = fma(splat<vf>(-4.25f), d[3], d[1] + d[5]);
    const vf even2 = fma(splat<vf>(-1.25f), d[4], fma(splat<vf>(0.25f), d[2], d[6]));
    const vf odd2 = fma(splat<vf>(-2.5f), d[3], fma(splat<vf>(0.5f), d[1], d[5] + d[5]));
    const vf even3 = fma(splat<vf>(-5.0f), d[4], fma(splat<vf>(4.0f), d[2], d[6]));
    const vf odd3 = fma(splat<vf>(-2.5f), d[3], fma(splat<vf>(0.5f), d[5], d[1] + d[1]));
    r[0] = fma(splat<vf>(5.25f), d[2] - d[4], d[6] - d[0]);
    r[1] = fma(splat<vf>(5.25f), d[3] - d[5], d[7] - d[1]);
    r[2] = even1 + odd1, r[3] = even1 - odd1;
    r[4] = even2 + odd2, r[5] = even2 - odd2;
    r[6] = even3 + odd3, r[7] = even3 - odd3;
  }
  static FD_INLINE void output(const vf* m, vf* y) {
    const vf one = splat<vf>(-2.0f / 9), two = splat<vf>(1.0f / 90), half = splat<vf>(8.0f / 45);
    const vf even1 = one * (m[2] + m[3]), odd1 = one * (m[2] - m[3]);
    const vf even2 = two * (m[4] + m[5]), odd2 = two * (m[4] - m[5]);
    const vf even3 = half * (m[6] + m[7]), odd3 = half * (m[6] - m[7]);
    y[0] = (even1 + even2) + (even3 - m[0]);
    y[1] = fma(splat<vf>(2.0f), odd2, fma(splat<vf>(0.5f), odd3, odd1));
    y[2] = fma(splat<vf>(4.0f), even2, fma(splat<vf>(0.25f), even3, even1));
    y[3] = fma(splat<vf>(8.0f), odd2, fma(splat<vf>(0.125f), odd3, odd1));
    y[4] = fma(splat<vf>(16.0f), even2, fma(splat<vf>(0.0625f), even3, even1));
    y[5] = fma(splat<vf>(32.0f), odd2, fma(splat<vf>(0.03125f), odd3, odd1)) + m[1];
  }
};

// A column's points as they are multiplied, kSums sums at a time: what tiles of either size have, what those of six have
// besides, and what those of four have.
enum Kind { kEither, kSix, kFour };
constexpr int kKinds = 3, kSums = 24;
constexpr int points_of(int kind) { return kind == kFour ? 2 : 4; }
constexpr int most_tiles(int kind) { return kSums / points_of(kind); }

// Values of g0 + g1 x + g2 x^2 at a kind's points, all by additions, which have execution units of their own.
template <int kind> FD_INLINE void values(vf g0, vf g1, vf g2, vf* u) {
  if constexpr (kind == kEither) {
    const vf even = g0 + g2;
    u[0] = g0, u[1] = g2, u[2] = even + g1, u[3] = even - g1;
  } else {
    const vf odd = g1 + g1, g22 = g2 + g2, even = (g22 + g22) + g0;
    u[0] = even + odd, u[1] = even - odd;
    if constexpr (kind == kSix) {
      const vf g00 = g0 + g0, of_half = (g00 + g00) + g2;
      u[2] = of_half + odd, u[3] = of_half - odd;
    }
  }
}

// m [R tiles, points of the kind] = V u, or m += that, for W filters, of which `rows` has the three columns at a row of points,
// rows_stride floats further at each word. Touches what lies from `ahead` on for L2, ahead_stride floats further.
template <int kind, int R>
__attribute__((noinline)) void multiply_nested(const float* v, const float* rows, int64_t rows_stride, int64_t words,
                                               float* m, bool more, const float* ahead, int64_t ahead_stride) {
  constexpr int P = points_of(kind);
  vf sum[R][P];
  const auto all = [&](auto f) __attribute__((always_inline)) {
    each<R>([&](int r) __attribute__((always_inline)) {
      each<P>([&](int q) __attribute__((always_inline)) { f(sum[r][q], m + (r * P + q) * W); });
    });
  };
  all([](vf& s, float*) __attribute__((always_inline)) { s = vf{}; });
  for (int64_t k = 0; k < words; ++k, rows += rows_stride, ahead += ahead_stride) {
    const float* from = v + k / kLanes * (kLanes * kSums) + k % kLanes;
    __builtin_prefetch(ahead, 0, 2);
    vf u[P];
    values<kind>(load(rows), load(rows + W), load(rows + 2 * W), u);
    each<R>([&](int r) __attribute__((always_inline)) {
      each<P>([&](int q) __attribute__((always_inline)) {
        sum[r][q] = fma(splat<vf>(from[(r * P + q) * kLanes]), u[q], sum[r][q]);
      });
    });
  }
  if (more) all([](vf& s, float* at) __attribute__((always_inline)) { store(at, s + load(at)); });
  else all([](vf& s, float* at) __attribute__((always_inline)) { store(at, s); });
}

typedef void (*MultiplyNested)(const float*, const float*, int64_t, int64_t, float*, bool, const float*, int64_t);

template <int kind, int... i> constexpr auto nested_of(std::integer_sequence<int, i...>) {
  struct { MultiplyNested at[sizeof...(i)]; } table{{&multiply_nested<kind, i + 1>...}};
  return table;
}
template <int kind> FD_INLINE MultiplyNested multiply_nested_of(int64_t tiles) {
  static constexpr auto table = nested_of<kind>(std::make_integer_sequence<int, most_tiles(kind)>{});
  return table.at[tiles - 1];
}

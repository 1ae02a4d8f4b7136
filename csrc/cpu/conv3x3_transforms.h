// Winograd's transforms in one dimension: of kIn pixels, and to kOut results. Include inside a kernel file, after simd.h.
// fastdiff/ops/conv3x3.py packs weights at the same points.

// F(4, 3) at the points 0, +-a, +-b, infinity: an even and an odd part serve both signs. The filter is evaluated there as it
// is; what that lacks of G, 1 / prod_j (p_i - p_j), which is 1 / (2 aa (aa - bb)) at +-a, is in the last transform's constants,
// where it costs nothing. even: its values at +-a and +-b are given times at_a and at_b, about as large as at the others.
template <bool even> struct FourOf {
  static constexpr int kOut = 4, kIn = 6;
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f, aa = 0.5f, bb = 2.0f;
  static constexpr double at_a = even ? 0.75 : 1, at_b = even ? 0.375 : 1;  // factors of the filter's values there
  static constexpr float of_a = static_cast<float>(-2 / (3 * at_a)), of_b = static_cast<float>(1 / (6 * at_b));
  static FD_INLINE void input(const vf* d, vf* r) {
    const vf even_a = fma(splat<vf>(-bb), d[2], d[4]), odd_a = fma(splat<vf>(-bb), d[1], d[3]);
    const vf even_b = fma(splat<vf>(-aa), d[2], d[4]), odd_b = fma(splat<vf>(-aa), d[1], d[3]);
    r[0] = fma(splat<vf>(-(aa + bb)), d[2], fma(splat<vf>(aa * bb), d[0], d[4]));
    r[1] = fma(splat<vf>(a), odd_a, even_a), r[2] = fma(splat<vf>(-a), odd_a, even_a);
    r[3] = fma(splat<vf>(b), odd_b, even_b), r[4] = fma(splat<vf>(-b), odd_b, even_b);
    r[5] = fma(splat<vf>(-(aa + bb)), d[3], fma(splat<vf>(aa * bb), d[1], d[5]));
  }
  static FD_INLINE void output(const vf* m, vf* y) {
    const vf even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = fma(splat<vf>(of_a), even_a, fma(splat<vf>(of_b), even_b, m[0]));
    y[1] = fma(splat<vf>(b * of_b), odd_b, splat<vf>(a * of_a) * odd_a);
    y[2] = fma(splat<vf>(bb * of_b), even_b, splat<vf>(aa * of_a) * even_a);
    y[3] = fma(splat<vf>(bb * b * of_b), odd_b, fma(splat<vf>(aa * a * of_a), odd_a, m[5]));
  }
  // The transposes of `output` and, at the points as they are, of `filter`: for a weight's gradient.
  static FD_INLINE void output_back(const vf* y, vf* m) {
    const vf even_a = splat<vf>(of_a) * fma(splat<vf>(aa), y[2], y[0]);
    const vf even_b = splat<vf>(of_b) * fma(splat<vf>(bb), y[2], y[0]);
    const vf odd_a = splat<vf>(a * of_a) * fma(splat<vf>(aa), y[3], y[1]);
    const vf odd_b = splat<vf>(b * of_b) * fma(splat<vf>(bb), y[3], y[1]);
    m[0] = y[0], m[5] = y[3];
    m[1] = even_a + odd_a, m[2] = even_a - odd_a, m[3] = even_b + odd_b, m[4] = even_b - odd_b;
  }
  static FD_INLINE void filter_back(const vf* u, vf* g) {
    const vf even_a = u[1] + u[2], odd_a = u[1] - u[2], even_b = u[3] + u[4], odd_b = u[3] - u[4];
    g[0] = u[0] + even_a + even_b;
    g[1] = fma(splat<vf>(b), odd_b, splat<vf>(a) * odd_a);
    g[2] = fma(splat<vf>(bb), even_b, fma(splat<vf>(aa), even_a, u[5]));
  }
  // Values of g0 + g1 p + g2 p^2, of which g0, a g1 and a^2 g2 are given: in a's unit the points are 0, +-1, +-2. All by
  // additions: they have execution units of their own beside those that multiply, which the products occupy.
  static FD_INLINE void filter(vf g0, vf g1, vf g2, vf* u) {
    const vf two = g2 + g2, at_a = g0 + g2, at_b = (two + two) + g0, twice = g1 + g1;
    u[0] = g0, u[5] = two;
    u[1] = at_a + g1, u[2] = at_a - g1, u[3] = at_b + twice, u[4] = at_b - twice;
  }
  // One of them.
  static FD_INLINE vf filter_at(int point, vf g0, vf g1, vf g2) {
    const vf two = g2 + g2, at_a = g0 + g2, at_b = (two + two) + g0, twice = g1 + g1;
    switch (point) {
      case 0: return g0;
      case 1: return at_a + g1;
      case 2: return at_a - g1;
      case 3: return at_b + twice;
      case 4: return at_b - twice;
      default: return two;
    }
  }
};

typedef FourOf<false> Four;

// F(2, 3) at 0, +-1, infinity, in the same manner.
struct Two {
  static constexpr int kOut = 2, kIn = 4;
  static FD_INLINE void input(const vf* d, vf* r) {
    r[0] = d[0] - d[2], r[1] = d[1] + d[2], r[2] = d[2] - d[1], r[3] = d[3] - d[1];
  }
  static FD_INLINE void output(const vf* m, vf* y) {
    y[0] = fma(splat<vf>(0.5f), m[1] + m[2], m[0]);
    y[1] = fma(splat<vf>(0.5f), m[1] - m[2], m[3]);
  }
};

// Winograd's transforms in one dimension: of kIn pixels, and to kOut results. Include inside a kernel file, after simd.h.
// The weights' transform G is in fastdiff/ops/conv3x3.py and must have the same points.

// F(4, 3) at the points 0, +-a, +-b, infinity: an even and an odd part serve both signs.
struct Four {
  static constexpr int kOut = 4, kIn = 6;
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f, aa = 0.5f, bb = 2.0f;
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
    y[0] = m[0] + (even_a + even_b);
    y[1] = fma(splat<vf>(b), odd_b, splat<vf>(a) * odd_a);
    y[2] = fma(splat<vf>(bb), even_b, splat<vf>(aa) * even_a);
    y[3] = fma(splat<vf>(bb * b), odd_b, fma(splat<vf>(aa * a), odd_a, m[5]));
  }
};

// F(2, 3) at 0, +-1, infinity.
struct Two {
  static constexpr int kOut = 2, kIn = 4;
  static FD_INLINE void input(const vf* d, vf* r) {
    r[0] = d[2] - d[0], r[1] = d[1] + d[2], r[2] = d[2] - d[1], r[3] = d[3] - d[1];
  }
  static FD_INLINE void output(const vf* m, vf* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

// Philox4x32-10 and Box-Muller on vectors: W blocks, 4 W normals at a time. Include inside a kernel file, after simd.h.
// Every operation rounds as docs/noise.md says; the extension is compiled with -ffp-contract=off.

struct Stream { uint32_t k0, k1, draw, domain; };  // a sample's seed words, and which of its noises

FD_INLINE Stream stream_of(int64_t seed, int64_t draw, int64_t domain) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(draw),
          static_cast<uint32_t>(domain)};
}

// Four words of each block, one 64-bit lane a block; only the low halves of w count, the high halves are leftovers.
FD_INLINE void philox(vq block, const Stream& s, vq w[4]) {
  vq c0 = block, c1 = block >> 32, c2 = splat<vq>(uint64_t{s.draw}), c3 = splat<vq>(uint64_t{s.domain});
  uint32_t k0 = s.k0, k1 = s.k1;
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const vq p0 = multiply_low(c0, kPhiloxM0), p1 = multiply_low(c2, kPhiloxM1);
    c0 = (p1 >> 32) ^ c1 ^ splat<vq>(uint64_t{k0});
    c2 = (p0 >> 32) ^ c3 ^ splat<vq>(uint64_t{k1});
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

template <int N> FD_INLINE vf polynomial(const float (&c)[N], vf x) {
  vf y = splat<vf>(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) y = y * x + c[i];
  return y;
}

// Cosine and sine of `turn` + q quarter turns, q in [-1/2, 1/2]; of turn the two lowest bits count.
FD_INLINE void quarter_turns(vf q, vu turn, vf& cosine, vf& sine) {
  constexpr float sin_poly[] = FASTDIFF_SIN_POLY, cos_poly[] = FASTDIFF_COS_POLY;
  const vf q2 = q * q;
  const vf sin = q * polynomial(sin_poly, q2), cos = polynomial(cos_poly, q2);
  const vi odd = (turn & 1u) != 0;
  const vu flip_c = ((turn + 1u) & 2u) << 30, flip_s = (turn & 2u) << 30;
  cosine = reinterpret_cast<vf>(reinterpret_cast<vu>(odd ? sin : cos) ^ flip_c);
  sine = reinterpret_cast<vf>(reinterpret_cast<vu>(odd ? cos : sin) ^ flip_s);
}

FD_INLINE void box_muller(vu w0, vu w1, vf& z0, vf& z1) {
  constexpr float log_poly[] = FASTDIFF_LOG_POLY;
  const vf u = from_unsigned(w0) * kTwoToMinus32 + kTwoToMinus33;
  const vi shifted = reinterpret_cast<vi>(u) - kSqrtHalfBits;
  const vf exponent = __builtin_convertvector(shifted >> 23, vf);
  const vf f = reinterpret_cast<vf>((shifted & 0x7FFFFF) + kSqrtHalfBits) - 1.0f;
  const vf squared = exponent * -kLn2Times2 + f * polynomial(log_poly, f);
  const vf r = square_root(squared);  // never negative: tests/kernels/test_noise_page.py has them all

  vf cosine, sine;
  quarter_turns(__builtin_convertvector(reinterpret_cast<vi>(w1 << 2), vf) * kTwoToMinus32, w1 >> 30, cosine, sine);
  z0 = r * cosine;
  z1 = r * sine;
}

// Lane l works on block (W/4)(l % 4) + l/4 of the W: then a transpose within 128-bit lanes leaves all in order.
struct LaneBlocks {
  vq even, odd;
  FD_INLINE LaneBlocks() {
    for (int i = 0; i < W / 2; ++i) {
      even[i] = W / 4 * ((2 * i) % 4) + 2 * i / 4;
      odd[i] = W / 4 * ((2 * i + 1) % 4) + (2 * i + 1) / 4;
    }
  }
};

FD_INLINE void store_blocks(const vf z[4], float* out) {
#if FASTDIFF_LEVEL >= 2
#define FD_UNPACK(half, a, b) _mm512_unpack##half##_ps(a, b)
#define FD_UNPACK2(half, a, b) _mm512_castpd_ps(_mm512_unpack##half##_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#elif FASTDIFF_LEVEL == 1
#define FD_UNPACK(half, a, b) _mm256_unpack##half##_ps(a, b)
#define FD_UNPACK2(half, a, b) _mm256_castpd_ps(_mm256_unpack##half##_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)))
#elif defined(__SSE2__)
#define FD_UNPACK(half, a, b) _mm_unpack##half##_ps(a, b)
#define FD_UNPACK2(half, a, b) _mm_castpd_ps(_mm_unpack##half##_pd(_mm_castps_pd(a), _mm_castps_pd(b)))
#endif
#ifdef FD_UNPACK
  const vf a = FD_UNPACK(lo, z[0], z[1]), b = FD_UNPACK(lo, z[2], z[3]);
  const vf c = FD_UNPACK(hi, z[0], z[1]), d = FD_UNPACK(hi, z[2], z[3]);
  store(out, vf(FD_UNPACK2(lo, a, b)));
  store(out + W, vf(FD_UNPACK2(hi, a, b)));
  store(out + 2 * W, vf(FD_UNPACK2(lo, c, d)));
  store(out + 3 * W, vf(FD_UNPACK2(hi, c, d)));
#undef FD_UNPACK
#undef FD_UNPACK2
#else
  for (int l = 0; l < W; ++l)
    for (int j = 0; j < 4; ++j) out[4 * (W / 4 * (l % 4) + l / 4) + j] = z[j][l];
#endif
}

// out[0 ... 4 W): the normals of blocks first ... first + W - 1.
FD_INLINE void normals(const Stream& s, uint64_t first, float* out) {
  const LaneBlocks lane;
  vq even[4], odd[4];
  philox(lane.even + first, s, even);
  philox(lane.odd + first, s, odd);
  vu w[4];
  for (int j = 0; j < 4; ++j) w[j] = reinterpret_cast<vu>((even[j] & 0xFFFFFFFFull) | (odd[j] << 32));
  vf z[4];
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
  store_blocks(z, out);
}

// out[0 ... n): elements first ... first + n - 1 of the sample's noise.
inline void noise_run(const Stream& s, int64_t first, int64_t n, float* out) {
  float buffer[4 * W];
  int64_t done = 0;
  const int64_t lead = first % 4;
  if (lead && n > 0) {
    normals(s, first / 4, buffer);
    done = 4 * W - lead < n ? 4 * W - lead : n;
    std::memcpy(out, buffer + lead, done * sizeof(float));
  }
  for (; n - done >= 4 * W; done += 4 * W) normals(s, (first + done) / 4, out + done);
  if (done < n) {
    normals(s, (first + done) / 4, buffer);
    std::memcpy(out + done, buffer, (n - done) * sizeof(float));
  }
}

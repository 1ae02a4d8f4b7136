// Vectors of one instruction set, on GCC's vector extensions; intrinsics only where those have no word for it.
// No include guard: every_isa.h includes this once per instruction set, inside that set's namespace and target.

#define FD_INLINE inline __attribute__((always_inline))
#define FD_VECTOR(bytes) __attribute__((vector_size(bytes)))

#if FASTDIFF_LEVEL >= 2
constexpr int kBytes = 64;
#elif FASTDIFF_LEVEL == 1
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int W = kBytes / 4;  // floats in a vector

typedef float vf FD_VECTOR(kBytes);
typedef double vd FD_VECTOR(kBytes);
typedef int32_t vi FD_VECTOR(kBytes);
typedef uint32_t vu FD_VECTOR(kBytes);
typedef uint64_t vq FD_VECTOR(kBytes);

template <class A> struct Simd;
template <> struct Simd<float> { typedef vf V; static constexpr int N = W; };
template <> struct Simd<double> { typedef vd V; static constexpr int N = W / 2; };
template <class A> using Vec = typename Simd<A>::V;

// f(0), ..., f(M - 1) unrolled before GCC decides what lives in registers: a loop leaves arrays of vectors on the stack.
template <int M, class F> FD_INLINE void each(const F& f) {
  [&]<int... j>(std::integer_sequence<int, j...>) __attribute__((always_inline)) { (f(j), ...); }
  (std::make_integer_sequence<int, M>{});
}

template <class V, class A> FD_INLINE V splat(A a) { return a - V{}; }

FD_INLINE vf fma(vf a, vf b, vf c) {
#if FASTDIFF_LEVEL >= 2
  return _mm512_fmadd_ps(a, b, c);
#elif FASTDIFF_LEVEL == 1
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
FD_INLINE vd fma(vd a, vd b, vd c) { return a * b + c; }

FD_INLINE vf square_root(vf a) {
#if FASTDIFF_LEVEL >= 2
  return _mm512_sqrt_ps(a);
#elif FASTDIFF_LEVEL == 1
  return _mm256_sqrt_ps(a);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}

// uint32 -> float, one correct rounding.
FD_INLINE vf from_unsigned(vu a) {
#if FASTDIFF_LEVEL >= 2
  return _mm512_cvtepu32_ps(reinterpret_cast<__m512i>(a));
#else
  // High half times 2^16 and low half are exact; their sum rounds once.
  return __builtin_convertvector(reinterpret_cast<vi>(a >> 16), vf) * 65536.0f +
         __builtin_convertvector(reinterpret_cast<vi>(a & 0xFFFFu), vf);
#endif
}

// Low 32 bits of each 64-bit lane times m.
FD_INLINE vq multiply_low(vq a, uint32_t m) {
#if FASTDIFF_LEVEL >= 2
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif FASTDIFF_LEVEL == 1
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
  return (a & 0xFFFFFFFFu) * m;
#endif
}

FD_INLINE float sum(vf a) {
#if FASTDIFF_LEVEL >= 2
  return _mm512_reduce_add_ps(a);
#else
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
#endif
}
FD_INLINE int32_t largest(vi a) {
#if FASTDIFF_LEVEL >= 2
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(a));
#else
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
#endif
}
FD_INLINE double sum(vd a) {
  double s = 0;
  for (int i = 0; i < W / 2; ++i) s += a[i];
  return s;
}

// exp, relative error below 1 unit in the last place of float: 2^n times the Taylor-like minimax polynomial of degree 6
// on [-ln2/2, ln2/2] (Cephes' expf). The argument is clamped so that 2^n stays a normal number; NaN passes through.
FD_INLINE vf exponential(vf x) {
  x = x > 88.0f ? splat<vf>(88.0f) : x;
  x = x < -87.0f ? splat<vf>(-87.0f) : x;
  const vf magic = splat<vf>(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = fma(x, splat<vf>(1.44269504088896341f), magic);
  const vf n = shifted - magic;
  const vf r = fma(n, splat<vf>(2.12194440e-4f), fma(n, splat<vf>(-0.693359375f), x));
  vf p = splat<vf>(1.9875691500e-4f);
  p = fma(p, r, splat<vf>(1.3981999507e-3f));
  p = fma(p, r, splat<vf>(8.3334519073e-3f));
  p = fma(p, r, splat<vf>(4.1665795894e-2f));
  p = fma(p, r, splat<vf>(1.6666665459e-1f));
  p = fma(p, r, splat<vf>(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
}
FD_INLINE vd exponential(vd x) {
  for (int i = 0; i < W / 2; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// 1 + exp(-s), from 1 to infinity; NaN passes through. On AVX-512 2^t is cheaper: t rounded, a minimax polynomial of degree
// 5 (relative error 1.5e-7) or, rough, 4 (2.6e-6) for the rest, scaled without a clamp above; the one below keeps
// s = infinity.
template <bool rough = false> FD_INLINE vf inverse_sigmoid(vf s) {
#if FASTDIFF_LEVEL >= 2
  const vf t = _mm512_max_ps(splat<vf>(-126.0f), s * -1.44269504088896341f);
  const vf n = _mm512_roundscale_ps(t, 0), f = t - n;
  vf p = splat<vf>(rough ? 9.570102207362652e-3f : 1.3276472454890609e-3f);
  if constexpr (!rough) p = fma(p, f, splat<vf>(9.675540961325169e-3f));
  p = fma(p, f, splat<vf>(rough ? 5.591785907745361e-2f : 5.550713092088699e-2f));
  p = fma(p, f, splat<vf>(rough ? 2.40247443318367e-1f : 2.4022120237350464e-1f));
  p = fma(p, f, splat<vf>(rough ? 6.931217908859253e-1f : 6.931469440460205e-1f));
  p = fma(p, f, splat<vf>(rough ? 9.999992847442627e-1f : 1.0000001192092896f));
  return _mm512_scalef_ps(p, n) + 1.0f;
#else
  return exponential(-s) + 1.0f;
#endif
}
template <bool rough = false> FD_INLINE vd inverse_sigmoid(vd s) { return exponential(-s) + 1.0; }

// a / b; rough: to 14 bits, for what is rounded to a 16-bit type afterwards.
template <bool rough = false> FD_INLINE vf divide(vf a, vf b) {
#if FASTDIFF_LEVEL >= 2
  if constexpr (rough) return a * _mm512_rcp14_ps(b);
#endif
  return a / b;
}
template <bool rough = false> FD_INLINE vd divide(vd a, vd b) { return a / b; }

// s sigmoid(s) from t = kSiluUnit<A> s, relative error 2^-22, or what a 16-bit T cannot show. A caller that computes s by a
// multiply-add puts kSiluUnit into its factors, so that on AVX-512 2^t needs no multiplication: a minimax polynomial of
// the fraction of t, scaled by its floor without clamps, s = infinity included (vreduceps of infinity is 0). Its
// coefficients hold -log2(e) too: y = t / (-log2(e) (1 + 2^t)).
template <class A> constexpr A kSiluUnit = FASTDIFF_LEVEL >= 2 && sizeof(A) == 4 ? A(-1.4426950408889634) : A(1);
template <class T> FD_INLINE vf silu_of(vf t) {
#if FASTDIFF_LEVEL >= 2
  constexpr int degree = std::is_same_v<T, bfloat16> ? 3 : std::is_same_v<T, float16> ? 4 : 5;
  constexpr double fits[3][6] = {  // of 2^f on [0, 1]; relative error 7.5e-5, 2.6e-6, 7.5e-8
      {0.9999252185659142, 0.6958335404792918, 0.22606715539709055, 0.07802452268953192},
      {1.0000025933692647, 0.6930038344324988, 0.24144275709800028, 0.052011460299324144, 0.013534168062382872},
      {0.9999999250635878, 0.6931530732026261, 0.24015361702112634, 0.0558263181162335, 0.008989340023581907,
       0.001877576700019989}};
  const auto factor = [&](int i) __attribute__((always_inline)) {
    return splat<vf>(static_cast<float>(fits[degree - 3][i] * -1.4426950408889634));
  };
  const vf f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);  // t - floor(t)
  vf p = factor(degree);
  for (int i = degree; i-- > 0;) p = fma(p, f, factor(i));
  const vf d = _mm512_scalef_ps(p, t) + kSiluUnit<float>;
  return divide<sizeof(T) == 2>(t, d);
#else
  return divide(t, inverse_sigmoid(t));
#endif
}
template <class T> FD_INLINE vd silu_of(vd s) { return s / inverse_sigmoid(s); }

template <class V> FD_INLINE V sigmoid(V s) { return 1 / inverse_sigmoid(s); }

// N/2 floats, or the N/2 doubles that they are, to and from doubles.
typedef float half_vf FD_VECTOR(kBytes / 2);
FD_INLINE vd wide(const float* p) {
  half_vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}
FD_INLINE vd wide(const double* p) {
  vd v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FD_INLINE void narrow(float* p, vd v) {
  const half_vf h = __builtin_convertvector(v, half_vf);
  __builtin_memcpy(p, &h, sizeof h);
}
FD_INLINE void narrow(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }

// Loads and stores of n <= N elements, converting between the storage type and float or double.
template <class A> FD_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class A> FD_INLINE void store(A* p, Vec<A> v) { __builtin_memcpy(p, &v, sizeof v); }

#if FASTDIFF_LEVEL >= 2
FD_INLINE vf from_half(__m256i h, bfloat16) { return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
FD_INLINE vf from_half(__m256i h, float16) { return _mm512_cvtph_ps(h); }
#endif

FD_INLINE vf load(const bfloat16* p) {
#if FASTDIFF_LEVEL >= 2
  return from_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), bfloat16{});
#elif FASTDIFF_LEVEL == 1
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
FD_INLINE void store(bfloat16* p, vf v) {
#if FASTDIFF_LEVEL >= 3
  const __m256bh h = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &h, sizeof h);
#else
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu b = v == v ? rounded : (u >> 16) | 0x40u;
#if FASTDIFF_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(b)));
#else
  for (int i = 0; i < W; ++i) p[i].bits = static_cast<uint16_t>(b[i]);
#endif
#endif
}

FD_INLINE vf load(const float16* p) {
#if FASTDIFF_LEVEL >= 2
  return from_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), float16{});
#elif FASTDIFF_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
FD_INLINE void store(float16* p, vf v) {
#if FASTDIFF_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif FASTDIFF_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i] = from_float<float16>(v[i]);
#endif
}

template <class T> FD_INLINE Vec<Acc<T>> load_some(const T* p, int n, Acc<T> fill = 0) {
#if FASTDIFF_LEVEL >= 2
  const __mmask16 first = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_loadu_ps(splat<vf>(fill), first, p);
  if constexpr (sizeof(T) == 2)
    return _mm512_mask_blend_ps(first, splat<vf>(fill), from_half(_mm256_maskz_loadu_epi16(first, p), T{}));
#elif FASTDIFF_LEVEL == 1
  if constexpr (std::is_same_v<T, float>) {
    const vi within = vi{0, 1, 2, 3, 4, 5, 6, 7} < n;
    const vf v = _mm256_maskload_ps(p, reinterpret_cast<__m256i>(within));
    return within ? v : splat<vf>(fill);
  }
#endif
  constexpr int N = Simd<Acc<T>>::N;
  T buffer[N] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  Vec<Acc<T>> v = load(static_cast<const T*>(buffer));
  if (fill != 0)
    for (int i = n; i < N; ++i) v[i] = fill;
  return v;
}
template <class T> FD_INLINE void store_some(T* p, Vec<Acc<T>> v, int n) {
#if FASTDIFF_LEVEL >= 2
  const __mmask16 first = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, first, v);
  if constexpr (sizeof(T) == 2) {
    T buffer[W];
    store(static_cast<T*>(buffer), v);
    return _mm256_mask_storeu_epi16(p, first, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
#endif
  T buffer[Simd<Acc<T>>::N];
  store(static_cast<T*>(buffer), v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

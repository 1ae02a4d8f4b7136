// Means and variances of groups (contiguous channels) and of channels (channels-last). group_norm.h includes this.

// ---- moments. Sums are of x - k, k the mean of all that went before rounded to float, so that no more than half of a sum
// of squares is ever cancelled; with s = sum (x - k) and q = sum (x - k)^2 of n elements after `count` of mean mu,
// e = k - mu:
//     moved = s + n e,   mu += moved / total,   m2 += q + e (2 s + n e) - moved^2 / total,   total = count + n  (double)

struct Moments {
  double count = 0, mean = 0, m2 = 0;
  FD_INLINE void extend(double n, double k, double s, double q) {
    const double e = k - mean, moved = s + n * e, share = moved / (count + n);
    m2 += q + e * (s + moved) - moved * share;
    mean += share;
    count += n;
  }
  FD_INLINE void merge(const Moments& other) {  // Chan
    if (other.count == 0) return;
    const double delta = other.mean - mean, total = count + other.count;
    m2 += other.m2 + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
  FD_INLINE double variance() const { return m2 < 0 ? 0 : count > 0 ? m2 / count : 0; }
};

// The first n lanes; 0 in the others.
template <class V> FD_INLINE V first_lanes(V v, int n) {
  V lane;
  for (int i = 0; i < int(sizeof v / sizeof v[0]); ++i) lane[i] = i;
  return lane < splat<V>(static_cast<float>(n)) ? v : V{};
}

// Contiguous channels: elements begin ... end - 1 of a group, its channels one after the other.
template <class T> Moments group_moments(const GroupNormSilu& g, int64_t n, int64_t c0, int64_t begin, int64_t end) {
  typedef Acc<T> A;
  typedef Vec<A> V;
  constexpr int N = Simd<A>::N;
  constexpr int64_t chunk = 512 * N;
  const A* add = g.add ? static_cast<const A*>(g.add) + n * g.c + c0 : nullptr;
  const int64_t size = !add && g.x.c == g.s ? end : g.s;  // without gaps the group is one run
  Moments result;
  if (begin >= end) return result;
  int64_t c = begin / size, i = begin % size;  // where the walk is
  {
    const int64_t few = end - begin < kFew * N ? end - begin : kFew * N;
    double guess = 0;
    for (int64_t taken = 0, channel = c, from = i; taken < few; ++channel, from = 0) {
      const T* x = g.x.at<const T>(n, c0 + channel) + from;
      const int64_t length = few - taken < size - from ? few - taken : size - from;
      V s = {};
      int64_t j = 0;
      for (; j + N <= length; j += N) s += load(x + j);
      if (j < length) s += load_some(x + j, static_cast<int>(length - j));
      guess += double(sum(s)) + double(length) * or_zero(add, channel);
      taken += length;
    }
    result.mean = guess / double(few);
  }
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t last = first + chunk < end ? first + chunk : end;
    V s[4] = {}, q[4] = {};
    for (int64_t at = first; at < last;) {
      const int64_t length = last - at < size - i ? last - at : size - i;
      const double center = result.mean - or_zero(add, c);
      const A near = static_cast<A>(center);
      const V k = splat<V>(near), slip = splat<V>(static_cast<A>(near - center));  // x + add - mean = (x - k) + slip
      const T* x = g.x.at<const T>(n, c0 + c) + i;
      const auto from_mean = [&](V v) __attribute__((always_inline)) { return (v - k) + slip; };
      const auto one = [&](V d, int u) __attribute__((always_inline)) {
        s[u] += d;
        q[u] = fma(d, d, q[u]);
      };
      int64_t j = 0;
      for (; j + 4 * N <= length; j += 4 * N)
        each<4>([&](int u) __attribute__((always_inline)) { one(from_mean(load(x + j + u * N)), u); });
      for (; j + N <= length; j += N) one(from_mean(load(x + j)), 0);
      if (j < length) {
        const int rest = static_cast<int>(length - j);
        one(first_lanes(from_mean(load_some(x + j, rest)), rest), 1);  // in channels of one pixel, 15 slips would show
      }
      at += length;
      if ((i += length) == size) i = 0, ++c;
    }
    const double count = double(last - first);
    result.extend(count, result.mean, double(sum((s[0] + s[1]) + (s[2] + s[3]))),
                  double(sum((q[0] + q[1]) + (q[2] + q[3]))));
  }
  return result;
}

// ---- channels-last

constexpr int64_t piece_rows(int64_t c) { return kPiece / c / kRows * kRows > kRows ? kPiece / c / kRows * kRows : kRows; }
template <class A> constexpr int64_t block_channels() { return 4 * Simd<A>::N; }

// f(J, c) for channels begin ... end - 1: J vectors of them from c on, J = 0: fewer than one.
template <int most, class A, class F> FD_INLINE void by_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int N = Simd<A>::N;
  int64_t c = begin;
  if constexpr (most >= 4)
    for (; c + 4 * N <= end; c += 4 * N) f(std::integral_constant<int, 4>{}, c);
  if constexpr (most >= 2)
    for (; c + 2 * N <= end; c += 2 * N) f(std::integral_constant<int, 2>{}, c);
  for (; c + N <= end; c += N) f(std::integral_constant<int, 1>{}, c);
  if (c < end) f(std::integral_constant<int, 0>{}, c);
}

// Vector j of J at p, or the `some` elements there are where J is 0.
template <int J, class T> FD_INLINE Vec<Acc<T>> load_at(const T* p, int j, int some) {
  if constexpr (J == 0) return load_some(p, some);
  else return load(p + j * Simd<Acc<T>>::N);
}
template <int J, class T> FD_INLINE void store_at(T* p, Vec<Acc<T>> v, int j, int some) {
  if constexpr (J == 0) store_some(p, v, some);
  else store(p + j * Simd<Acc<T>>::N, v);
}

// Fetches the cache line of vector j at p, once a line: rows lie too far apart for the hardware to guess.
constexpr int64_t kAhead = 12;  // rows
template <class T> FD_INLINE void ahead(const T* p, int j) {
  constexpr int bytes = Simd<Acc<T>>::N * sizeof(T);
  if (j * bytes % 64 == 0) __builtin_prefetch(p + j * Simd<Acc<T>>::N);
}

// Sums of x - k and of its squares, of each of J vectors of channels over `rows` pixels, `stride` apart. A function of its
// own: inlined into its surroundings, GCC keeps the sums on the stack.
template <int J, class T>
__attribute__((noinline)) void sums_around(const T* x, int64_t stride, int64_t rows, int some, const Acc<T>* k,
                                           Acc<T>* s_out, Acc<T>* q_out) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N, M = J ? J : 1;
  V s[M] = {}, q[M] = {}, center[M];
  each<M>([&](int j) __attribute__((always_inline)) { center[j] = load(k + j * N); });
  for (int64_t r = 0; r < rows; ++r, x += stride)
    each<M>([&](int j) __attribute__((always_inline)) {
      ahead(x + kAhead * stride, j);
      const V d = load_at<J>(x, j, some) - center[j];
      s[j] += d;
      q[j] = fma(d, d, q[j]);
    });
  each<M>([&](int j) __attribute__((always_inline)) { store(s_out + j * N, s[j]), store(q_out + j * N, q[j]); });
}

// Mean and sum of squared deviations of each of J vectors of channels over `rows` pixels, `stride` apart.
template <int J, class T>
FD_INLINE void channel_moments(const T* x, int64_t stride, int64_t rows, int some, double* mean_out, double* m2_out) {
  typedef Acc<T> A;
  typedef Vec<A> V;
  constexpr int N = Simd<A>::N, M = J ? J : 1, D = W / 2;
  alignas(64) A k[M * N], s_of[M * N], q_of[M * N];
  alignas(64) double mean[M * N], m2[M * N];
  const int64_t few = rows < kFew ? rows : kFew;
  each<M>([&](int j) __attribute__((always_inline)) {
    V v = {};
    for (int64_t r = 0; r < few; ++r) v += load_at<J>(x + r * stride, j, some);
    store(k + j * N, v / static_cast<A>(few));
  });
  for (int i = 0; i < M * N; i += D) narrow(mean + i, wide(k + i)), narrow(m2 + i, vd{});
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t last = first + kRows < rows ? first + kRows : rows;
    sums_around<J>(x + first * stride, stride, last - first, some, k, s_of, q_of);
    const double n = double(last - first), part = 1 / double(last);
    for (int i = 0; i < M * N; i += D) {
      const vd mu = wide(mean + i), e = wide(k + i) - mu, sum = wide(s_of + i), moved = sum + n * e, share = moved * part;
      narrow(m2 + i, wide(m2 + i) + (wide(q_of + i) + e * (sum + moved) - moved * share));
      narrow(mean + i, mu + share);
      narrow(k + i, mu + share);
    }
  }
  const int count = J ? M * N : some;
  for (int i = 0; i < count; ++i) mean_out[i] = mean[i], m2_out[i] = m2[i] < 0 ? 0 : m2[i];
}

// Pieces of a sample's pixels, at least one, and items of work: a piece of pixels and a block of channels each.
inline int64_t pieces_of(const GroupNormSilu& g) {
  const int64_t rows = piece_rows(g.c), pieces = (g.s + rows - 1) / rows;
  return pieces > 0 ? pieces : 1;
}
template <class T> int64_t items_of(const GroupNormSilu& g) {
  constexpr int64_t block = block_channels<Acc<T>>();
  return g.s > 0 ? pieces_of(g) * ((g.c + block - 1) / block) : 0;
}

// Moments of one item of sample n, into moments [pieces, 2, c].
template <class T> void item_moments(const GroupNormSilu& g, int64_t n, int64_t item, double* moments) {
  typedef Acc<T> A;
  constexpr int64_t block = block_channels<A>();
  const int64_t height = piece_rows(g.c), blocks = (g.c + block - 1) / block, piece = item / blocks;
  const int64_t c0 = item % blocks * block, c1 = c0 + block < g.c ? c0 + block : g.c;
  const int64_t top = piece * height, count = g.s - top < height ? g.s - top : height;
  double* out = moments + piece * 2 * g.c;
  by_vectors<4, A>(c0, c1, [&](auto j, int64_t c) __attribute__((always_inline)) {
    channel_moments<decltype(j)::value>(g.x.at<const T>(n, c, top), g.x.s, count, static_cast<int>(c1 - c), out + c,
                                        out + g.c + c);
  });
}

// Moments of all channels of sample n, [pieces, 2, c], into the first piece's.
inline void merge_pieces(const GroupNormSilu& g, double* moments, int64_t pieces) {
  const int64_t rows = piece_rows(g.c);
  for (int64_t piece = 1; piece < pieces; ++piece) {
    const double* more = moments + piece * 2 * g.c;
    const double before = double(piece * rows), n = double(g.s - piece * rows < rows ? g.s - piece * rows : rows);
    const double share = n / (before + n), cross = before * share;
    for (int64_t c = 0; c < g.c; ++c) {
      const double delta = more[c] - moments[c];
      moments[c] += delta * share;
      moments[g.c + c] += more[g.c + c] + delta * delta * cross;
    }
  }
}

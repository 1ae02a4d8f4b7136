// Statistics and per-channel coefficients shared by group_norm_silu and its backward. Include inside a kernel file.

// Mean and sum of squared deviations of `count` numbers; `merge` is Chan's update, in double.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  FD_INLINE void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double delta = other_mean - mean, total = count + n;
    mean += delta * n / total;
    m2 += other_m2 + delta * delta * count * n / total;
    count = total;
  }
  FD_INLINE double variance() const { return count > 0 ? m2 / count : 0; }
};

// Items a thread should at least get, when each is `elements` elements.
FD_INLINE int64_t grain_of(int64_t elements) { return 16384 / (elements + 1) + 1; }

FD_INLINE double or_zero(const double* p, int64_t i) { return p ? p[i] : 0; }
FD_INLINE double or_zero(const float* p, int64_t i) { return p ? p[i] : 0; }

FD_INLINE double rstd_of(const GroupNormSilu& g, double var) { return 1 / __builtin_sqrt(var + g.eps); }

// The whole op as a map of x: y = silu((x - m) a + b). m is the mean rounded; what the rounding lost is in b.
template <class A> struct Channel { A m, a, b; };

template <class A> FD_INLINE Channel<A> channel_map(const GroupNormSilu& g, int64_t n, int64_t c, double mean, double rstd) {
  const int64_t i = n * g.c + c;
  const double gain = 1 + or_zero(static_cast<const A*>(g.scale), i);
  const double slope = rstd * static_cast<const A*>(g.weight)[c];
  const double center = mean - or_zero(static_cast<const A*>(g.add), i);
  const A m = static_cast<A>(center);
  const double b = (static_cast<const A*>(g.bias)[c] - (center - m) * slope) * gain + or_zero(static_cast<const A*>(g.shift), i);
  return {m, static_cast<A>(slope * gain), static_cast<A>(b)};
}

template <bool silu, class V> FD_INLINE V activate(V s) {
  if constexpr (silu) return s / (1 + exponential(-s));
  else return s;
}

// ---- contiguous channels

constexpr int64_t kChunk = 2048;  // elements that two passes read from L1

// Sum over a run; sum and sum of squares of x - center over a run.
template <class T> FD_INLINE void add_run(const T* x, int64_t n, Vec<Acc<T>> s[4]) {
  constexpr int N = Simd<Acc<T>>::N;
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N)
    for (int j = 0; j < 4; ++j) s[j] += load(x + i + j * N);
  for (; i + N <= n; i += N) s[0] += load(x + i);
  if (i < n) s[1] += load_some(x + i, static_cast<int>(n - i));
}
template <class T> FD_INLINE void add_deviations(const T* x, int64_t n, Acc<T> center, Vec<Acc<T>> s[4], Vec<Acc<T>> q[4]) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  const V m = splat<V>(center);
  const auto one = [&](V v, int j) __attribute__((always_inline)) {
    const V d = v - m;
    s[j] += d;
    q[j] = fma(d, d, q[j]);
  };
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N)
    for (int j = 0; j < 4; ++j) one(load(x + i + j * N), j);
  for (; i + N <= n; i += N) one(load(x + i), 0);
  if (i < n) one(load_some(x + i, static_cast<int>(n - i), center), 1);
}
template <class V> FD_INLINE double total(const V s[4]) { return double(sum(s[0] + s[1])) + double(sum(s[2] + s[3])); }

// Moments of x + add over channels c0 ... c0 + per - 1 of sample n: two passes over each chunk that fits L1, chunks merged.
template <class T> Moments group_moments(const GroupNormSilu& g, int64_t n, int64_t c0, int64_t per) {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const A* add = g.add ? static_cast<const A*>(g.add) + n * g.c : nullptr;
  int64_t channels = per, size = g.s;
  if (!add && g.x.c == g.s) channels = 1, size = per * g.s;  // the group is one run
  const int64_t together = size >= kChunk || size == 0 ? 1 : kChunk / size;
  Moments result;
  for (int64_t c = 0; c < channels; c += together) {
    const int64_t last = c + together < channels ? c + together : channels;
    for (int64_t i = 0; i < size; i += kChunk) {
      const int64_t length = size - i < kChunk ? size - i : kChunk;
      const double count = double(length) * double(last - c);
      V s[4] = {}, d[4] = {}, q[4] = {};
      double offset = 0;
      for (int64_t k = c; k < last; ++k) {
        add_run(g.x.at<const T>(n, c0 + k) + i, length, s);
        offset += or_zero(add, c0 + k) * length;
      }
      const double guess = (total(s) + offset) / count;
      double lost = 0;  // what the rounding of guess - add took from the deviations of a channel
      for (int64_t k = c; k < last; ++k) {
        const double center = guess - or_zero(add, c0 + k);
        add_deviations(g.x.at<const T>(n, c0 + k) + i, length, static_cast<A>(center), d, q);
        lost += (static_cast<A>(center) - center) * length;
      }
      const double moved = total(d), m2 = total(q) - moved * moved / count;
      result.merge(count, guess + (moved + lost) / count, m2 > 0 ? m2 : 0);
    }
  }
  return result;
}

// ---- channels-last

// Per-channel mean and sum of squared deviations (forward), or the sums of the backward pass: up to three rows of [c].
struct ChannelSums {
  double* row[3];
  ChannelSums(char* memory, int64_t c) {
    for (int i = 0; i < 3; ++i) row[i] = reinterpret_cast<double*>(memory) + i * c;
  }
  static int64_t bytes(int64_t c) { return (3 * c * 8 + 63) / 64 * 64; }
};

template <class A> struct ChannelTable {
  A *m, *a, *b;
  ChannelTable(char* memory, int64_t c) : m(reinterpret_cast<A*>(memory)), a(m + c), b(a + c) {}
  static int64_t bytes(int64_t c) { return (3 * c * sizeof(A) + 63) / 64 * 64; }
};

template <class A> constexpr int64_t channel_block() { return 4 * Simd<A>::N; }
constexpr int64_t kRows = 64;  // rows that two passes read from L1

// Moments over all pixels of the channels from c0 on, at most channel_block of them.
template <class T> void channel_moments(const GroupNormSilu& g, int64_t n, int64_t c0, const ChannelSums& out) {
  typedef Vec<Acc<T>> V;
  constexpr int N = Simd<Acc<T>>::N;
  constexpr int64_t block = channel_block<Acc<T>>();
  const int64_t width = g.c - c0 < block ? g.c - c0 : block;
  double* mean = out.row[0] + c0;
  double* m2 = out.row[1] + c0;
  for (int64_t c = 0; c < width; ++c) mean[c] = m2[c] = 0;
  for (int64_t first = 0; first < g.s; first += kRows) {
    const int64_t last = first + kRows < g.s ? first + kRows : g.s;
    const double count = double(last - first);
    V s[4] = {}, d[4] = {}, q[4] = {}, center[4];
    const auto each = [&](auto f) __attribute__((always_inline)) {
      for (int64_t r = first; r < last; ++r) {
        const T* x = g.x.at<const T>(n, c0, r);
        if (width == block)
          for (int j = 0; j < 4; ++j) f(load(x + j * N), j);
        else
          for (int j = 0; j * N < width; ++j)
            f((j + 1) * N <= width ? load(x + j * N) : load_some(x + j * N, static_cast<int>(width - j * N)), j);
      }
    };
    each([&](V v, int j) __attribute__((always_inline)) { s[j] += v; });
    for (int j = 0; j < 4; ++j) center[j] = s[j] / static_cast<Acc<T>>(count);
    each([&](V v, int j) __attribute__((always_inline)) {
      const V dev = v - center[j];
      d[j] += dev;
      q[j] = fma(dev, dev, q[j]);
    });
    for (int64_t c = 0; c < width; ++c) {
      const double shift = double(d[c / N][c % N]) / count;
      Moments merged{double(first), mean[c], m2[c]};
      merged.merge(count, double(center[c / N][c % N]) + shift, double(q[c / N][c % N]) - count * shift * shift);
      mean[c] = merged.mean, m2[c] = merged.m2 > 0 ? merged.m2 : 0;
    }
  }
}

// Channels' moments -> groups' statistics -> the coefficients of every channel of sample n.
template <class A> void channel_maps(const GroupNormSilu& g, int64_t n, const ChannelSums& sums, const ChannelTable<A>& table) {
  const int64_t per = g.c / g.groups;
  const A* add = g.add ? static_cast<const A*>(g.add) + n * g.c : nullptr;
  for (int64_t group = 0; group < g.groups; ++group) {
    A* stats = static_cast<A*>(g.stats) + 2 * (n * g.groups + group);
    double mean = stats[0], var = stats[1];
    if (!g.given_stats) {
      Moments all;
      for (int64_t c = group * per; c < (group + 1) * per; ++c)
        all.merge(double(g.s), sums.row[0][c] + or_zero(add, c), sums.row[1][c]);
      mean = all.mean, var = all.variance();
      stats[0] = static_cast<A>(mean), stats[1] = static_cast<A>(var);
    }
    const double rstd = rstd_of(g, var);
    for (int64_t c = group * per; c < (group + 1) * per; ++c) {
      const Channel<A> k = channel_map<A>(g, n, c, mean, rstd);
      table.m[c] = k.m, table.a[c] = k.a, table.b[c] = k.b;
    }
  }
}

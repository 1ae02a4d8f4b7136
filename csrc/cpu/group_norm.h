// Statistics, per-channel coefficients and the division of work that group_norm_silu and its backward share. Include inside
// a kernel file. Nothing here depends on the number of threads or on the batch: pieces are cut by a sample's shape alone.

constexpr int64_t kPiece = 65536;  // elements of a sample or group whose sums are one piece of work
constexpr int64_t kRows = 64;      // pixels between two flushes of float sums to double, channels-last
constexpr int64_t kTile = 16;      // pixels whose values stay in L1 while coefficients stay in registers, channels-last
constexpr int64_t kFew = 16;       // pixels, or vectors, that give the first guess of a mean

// Items a thread should at least get, when each is `elements` elements.
FD_INLINE int64_t grain_of(int64_t elements) { return 16384 / (elements + 1) + 1; }

// A task (a sample, or one group of it) is `items` sums, what follows from them, and `outputs` units of results.
struct Stages { int64_t tasks, elements, bytes, items, outputs; };

// first(memory, task, item), finish(memory, task), second(memory, task, begin, end). A task stays with one thread, its data
// in that thread's cache, unless that leaves threads idle; the same pieces either way.
template <class First, class Finish, class Second>
void run_stages(const Stages& s, const First& first, const Finish& finish, const Second& second) {
  const int64_t workers = threads();
  if (s.tasks >= 4 * workers || s.tasks % workers == 0 || s.tasks * s.elements <= 16384) {
    parallel_for(s.tasks, grain_of(s.elements), [&](int64_t begin, int64_t end) {
      const Scratch memory(s.bytes);
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t i = 0; i < s.items; ++i) first(memory.data, task, i);
        finish(memory.data, task);
        second(memory.data, task, 0, s.outputs);
      }
    });
    return;
  }
  const Scratch memory(s.tasks * s.bytes);
  const auto of = [&](int64_t task) { return memory.data + task * s.bytes; };
  parallel_for(s.tasks * s.items, grain_of(s.elements / (s.items + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) first(of(i / s.items), i / s.items, i % s.items);
  });
  parallel_for(s.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) finish(of(task), task);
  });
  parallel_for(s.tasks * s.outputs, grain_of(s.elements / (s.outputs + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t task = i / s.outputs, stop = (task + 1) * s.outputs < end ? (task + 1) * s.outputs : end;
      second(of(task), task, i - task * s.outputs, stop - task * s.outputs);
      i = stop;
    }
  });
}

// f(0), ..., f(M - 1) unrolled before GCC decides what lives in registers: a loop leaves arrays of vectors on the stack.
template <int M, class F> FD_INLINE void each(const F& f) {
  [&]<int... j>(std::integer_sequence<int, j...>) __attribute__((always_inline)) { (f(j), ...); }
  (std::make_integer_sequence<int, M>{});
}

constexpr int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

FD_INLINE double or_zero(const double* p, int64_t i) { return p ? p[i] : 0; }
FD_INLINE double or_zero(const float* p, int64_t i) { return p ? p[i] : 0; }

FD_INLINE double rstd_of(const GroupNormSilu& g, double var) { return 1 / __builtin_sqrt(var + g.eps); }

template <class A> FD_INLINE A* stats_of(const GroupNormSilu& g, int64_t n, int64_t group) {
  return static_cast<A*>(g.stats) + 2 * (n * g.groups + group);
}

// What 16-bit results allow: a relative error of 2^-14 moves them by less than an eighth of their last place.
template <class T> constexpr bool kRough = sizeof(T) == 2;

// ---- the op as a map of x a channel: y = silu((x - m) a + b). m is the mean rounded; what the rounding lost is in b.

template <class A> struct ChannelTable {
  A *m, *a, *b;
  ChannelTable(char* memory, int64_t c) : m(reinterpret_cast<A*>(memory)), a(m + c), b(a + c) {}
  static int64_t bytes(int64_t c) { return aligned(3 * c * sizeof(A)); }
};

// The map of channels c0 ... c0 + count - 1 of sample n from their means and 1 / standard deviations.
template <class A>
void channel_maps(const GroupNormSilu& g, int64_t n, int64_t c0, int64_t count, const double* mean, const double* rstd,
                  const ChannelTable<A>& table) {
  constexpr int64_t step = W / 2;
  const A *weight = static_cast<const A*>(g.weight) + c0, *bias = static_cast<const A*>(g.bias) + c0;
  const auto row = [&](const void* p) { return p ? static_cast<const A*>(p) + n * g.c + c0 : nullptr; };
  const A *add = row(g.add), *scale = row(g.scale), *shift = row(g.shift);
  int64_t c = 0;
  for (; c + step <= count; c += step) {
    const vd gain = scale ? 1 + wide(scale + c) : splat<vd>(1.0), slope = wide(rstd + c) * wide(weight + c);
    const vd center = add ? wide(mean + c) - wide(add + c) : wide(mean + c);
    narrow(table.m + c, center);
    narrow(table.a + c, slope * gain);
    const vd b = (wide(bias + c) - (center - wide(table.m + c)) * slope) * gain;
    narrow(table.b + c, shift ? b + wide(shift + c) : b);
  }
  for (; c < count; ++c) {
    const double gain = 1 + or_zero(scale, c), slope = rstd[c] * weight[c], center = mean[c] - or_zero(add, c);
    table.m[c] = static_cast<A>(center), table.a[c] = static_cast<A>(slope * gain);
    table.b[c] = static_cast<A>((bias[c] - (center - table.m[c]) * slope) * gain + or_zero(shift, c));
  }
}

// The same from known statistics of groups, for all channels; memory for 2 c doubles.
template <class A> void channel_maps(const GroupNormSilu& g, int64_t n, double* memory, const ChannelTable<A>& table) {
  const int64_t per = g.c / g.groups;
  double *mean = memory, *rstd = memory + g.c;
  for (int64_t group = 0; group < g.groups; ++group) {
    const A* stats = stats_of<A>(g, n, group);
    const double r = rstd_of(g, stats[1]);
    for (int64_t c = group * per; c < (group + 1) * per; ++c) mean[c] = stats[0], rstd[c] = r;
  }
  channel_maps(g, n, 0, g.c, mean, rstd, table);
}

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
    const T* x = g.x.at<const T>(n, c0 + c) + i;
    const int64_t most = end - begin < kFew * N ? end - begin : kFew * N, few = most < size - i ? most : size - i;
    V s = {};
    int64_t j = 0;
    for (; j + N <= few; j += N) s += load(x + j);
    if (j < few) s += load_some(x + j, static_cast<int>(few - j));
    result.mean = double(sum(s)) / double(few) + or_zero(add, c);
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
      const auto one = [&](V v, int u) __attribute__((always_inline)) {
        const V d = (v - k) + slip;
        s[u] += d;
        q[u] = fma(d, d, q[u]);
      };
      int64_t j = 0;
      for (; j + 4 * N <= length; j += 4 * N)
        each<4>([&](int u) __attribute__((always_inline)) { one(load(x + j + u * N), u); });
      for (; j + N <= length; j += N) one(load(x + j), 0);
      if (j < length) one(load_some(x + j, static_cast<int>(length - j), near), 1);
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

// Channels' moments -> groups' statistics; then [2, c] is mean and 1 / standard deviation of each channel's group.
template <class A> void group_statistics(const GroupNormSilu& g, int64_t n, double* moments) {
  const int64_t per = g.c / g.groups;
  const A* add = g.add ? static_cast<const A*>(g.add) + n * g.c : nullptr;
  for (int64_t group = 0; group < g.groups; ++group) {
    double *mean = moments + group * per, *m2 = mean + g.c, middle = 0, inner = 0, outer = 0;
    for (int64_t j = 0; j < per; ++j) {
      mean[j] += or_zero(add, group * per + j);
      middle += mean[j];
      inner += m2[j];
    }
    middle /= double(per);
    for (int64_t j = 0; j < per; ++j) outer += (mean[j] - middle) * (mean[j] - middle);
    const double var = g.s > 0 ? (inner + outer * double(g.s)) / (double(per) * double(g.s)) : 0, rstd = rstd_of(g, var);
    A* stats = stats_of<A>(g, n, group);
    stats[0] = static_cast<A>(middle), stats[1] = static_cast<A>(var);
    for (int64_t j = 0; j < per; ++j) mean[j] = middle, m2[j] = rstd;
  }
}

// An image's tiles and their way into the transformed domain. Include inside a kernel file, after conv3x3_product.h.

constexpr int64_t kSlab = 64;      // tiles of a slab, at least a row of them: V stays in L2 or near it
constexpr int64_t kVectorsIn = 2;  // vectors of channels that are normalised at once

FD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FD_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FD_INLINE int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

template <class T_, class Scheme_, class Op_> struct Tiles {
  typedef T_ T;
  typedef Scheme_ Scheme;
  typedef Op_ Op;
  typedef typename Op::Stored Stored;
  static constexpr int kIn = Scheme::kIn, kOut = Scheme::kOut, kPoints = kIn * kIn;
  static constexpr int64_t kUnitIn = Op::kScaled ? kShared : 16;
  static constexpr int64_t kChannels = Op::kScaled ? kShared : kVectorsIn * W;  // of a task

  const Conv3x3& a;
  const int64_t rows, cols;       // tiles of an image
  const int64_t width, words;     // stored channels of a tile in V; words that are summed
  const int64_t wide_o;           // output channels, those that fill the last unit included
  int64_t slab_rows, images;      // of a slab: rows of tiles, of how many images (1 where an image has several slabs)
  int64_t plane;                  // stored elements of one of V's matrices, odd in cache lines
  const float* tables = nullptr;  // [n] of ChannelTable<float>
  Stored* v = nullptr;

  explicit Tiles(const Conv3x3& a_)
      : a(a_), rows(parts(a.h, kOut)), cols(parts(a.w, kOut)), width(parts(a.norm.c, kUnitIn) * kUnitIn),
        words(parts(a.norm.c, Op::step)), wide_o(parts(a.o, kUnit) * kUnit) {
    const int64_t fit = most(1, kSlab / cols);
    images = rows >= fit ? 1 : least(fit / rows, a.norm.n);
    slab_rows = rows > fit ? parts(rows, parts(rows, fit)) : rows;
    plane = parts(slab_tiles(), Op::kGroup) * Op::kGroup * width + 128 / static_cast<int64_t>(sizeof(Stored));
  }

  // Where V has point (p, 0) of a tile, from channel c on; its next point is next_point() further. Matrices [tiles, width]
  // one after the other, or as multiply_filters or a weight's gradient take them.
  Stored* place(int p, int64_t tile, int64_t c) const {
    Stored* row = v + p * kIn * plane;
    if constexpr (Op::kOrder == Order::groups)
      return row + (tile / Op::kGroup * width + c) * Op::kGroup * kIn + tile % Op::kGroup * kIn * kLanes;
    else if constexpr (Op::kOrder == Order::columns)
      return row + (c / W * slab_tiles() + tile) * kIn * W;
    else if constexpr (Op::kOrder == Order::chunks)
      return row + (c / kShared * slab_tiles() + tile) * kShared + c % kShared;
    else
      return row + tile * width + c;
  }
  int64_t next_point() const {
    return Op::kOrder == Order::groups ? kLanes : Op::kOrder == Order::columns ? W : plane;
  }

  // What integers of V are multiplied by: [chunks of kShared channels, kIn, slab_tiles()], behind V.
  float* scales(int64_t c, int p, int64_t tile) const {
    return reinterpret_cast<float*>(v + kPoints * plane) + (c / kShared * kIn + p) * slab_tiles() + tile;
  }
  int64_t v_bytes() const {
    const int64_t scales = Op::kScaled ? parts(width, kShared) * kIn * slab_tiles() : 0;
    return aligned(kPoints * plane * static_cast<int64_t>(sizeof(Stored)) + scales * 4);
  }

  // Behind the weights of integers: units of the output channels, factors of the input channels.
  const float* units() const { return static_cast<const float*>(a.packed) + kPoints * words * wide_o; }
  const float* factors() const { return units() + wide_o; }

  // A slab's rows of tiles, counted through the batch.
  struct Rows {
    int64_t first, last;
  };
  int64_t slab_tiles() const { return images * slab_rows * cols; }
  int64_t slabs() const { return images > 1 ? parts(a.norm.n, images) : a.norm.n * parts(rows, slab_rows); }
  Rows slab(int64_t i) const {
    if (images > 1) return {i * images * rows, least(a.norm.n * rows, (i + 1) * images * rows)};
    const int64_t per_image = parts(rows, slab_rows), first = i / per_image * rows + i % per_image * slab_rows;
    return {first, least((i / per_image + 1) * rows, first + slab_rows)};
  }
  static constexpr int64_t table_floats(int64_t c) { return ChannelTable<float>::bytes(c) / sizeof(float); }
  int64_t padded_cols() const { return cols * kOut + 2; }
  int64_t image_floats(int64_t tile_rows) const { return (tile_rows * kOut + 2) * padded_cols() * kChannels; }

  // Rows of pixels of channels c ... of sample n, kVectorsIn vectors, normalised, with a border of 0: the first
  // channels of image [height, padded_cols, kChannels].
  template <bool normed, bool silu> void activate(int64_t n, int64_t c, int64_t top, int64_t height, float* image) const {
    const ChannelTable<float> table(const_cast<char*>(reinterpret_cast<const char*>(tables + n * table_floats(a.norm.c))),
                                    a.norm.c);
    int some[kVectorsIn];
    vf m[kVectorsIn], slope[kVectorsIn], offset[kVectorsIn], factor[kVectorsIn];
    for (int j = 0; j < kVectorsIn; ++j) {
      some[j] = static_cast<int>(most(0, least(W, a.norm.c - c - j * W)));
      m[j] = slope[j] = offset[j] = vf{};
      if constexpr (Op::kScaled) factor[j] = load_some(factors() + c + j * W, some[j]);
      if (!normed || !some[j]) continue;
      m[j] = load_some(table.m + c + j * W, some[j]), slope[j] = load_some(table.a + c + j * W, some[j]);
      offset[j] = load_some(table.b + c + j * W, some[j]);
    }
    const auto value = [&](vf x, int j) __attribute__((always_inline)) {
      if constexpr (normed) x = fma(x - m[j], slope[j], offset[j]);
      x = silu ? silu_of<T>(x) : x;
      return Op::kScaled ? x * factor[j] : x;
    };
    const bool whole = some[kVectorsIn - 1] == W;
    for (int64_t i = 0; i < height; ++i) {
      float* out = image + i * padded_cols() * kChannels;
      const int64_t r = top + i;
      const int64_t end = r < 0 || r >= a.h ? 0 : a.w;
      const auto zero = [&](int64_t col) {
        for (int j = 0; j < kVectorsIn; ++j) store(out + col * kChannels + j * W, vf{});
      };
      zero(0);
      for (int64_t s = end + 1; s < padded_cols(); ++s) zero(s);
      const T* x = a.norm.x.template at<const T>(n, c, r * a.w);
      out += kChannels;
      if (whole) {
        for (int64_t s = 0; s < end; ++s, x += a.norm.x.s, out += kChannels)
          for (int j = 0; j < kVectorsIn; ++j) store(out + j * W, value(load(x + j * W), j));
      } else {
        for (int64_t s = 0; s < end; ++s, x += a.norm.x.s, out += kChannels)
          for (int j = 0; j < kVectorsIn; ++j) store(out + j * W, some[j] ? value(load_some(x + j * W, some[j]), j) : vf{});
      }
    }
  }

  // One row of tiles of the padded image: down its columns into `down` [kIn, padded_cols, kChannels], then along the rows
  // into V, where the row's first tile is number `tile`.
  void transform_in(const float* image, float* down, int64_t c, int64_t tile) const {
    const int64_t line = padded_cols() * kChannels;
    for (int64_t i = 0; i < line; i += W) {
      vf d[kIn], r[kIn];
      each<kIn>([&](int p) __attribute__((always_inline)) { d[p] = load(image + p * line + i); });
      Scheme::input(d, r);
      each<kIn>([&](int p) __attribute__((always_inline)) { store(down + p * line + i, r[p]); });
    }
    const int64_t next = next_point(), used = least(kChannels / W, parts(a.norm.c - c, W));
    for (int p = 0; p < kIn; ++p)
      for (int64_t t = 0; t < cols; ++t) {
        const float* from = down + p * line + t * kOut * kChannels;
        if constexpr (Op::kScaled) *scales(c, p, tile + t) = integers(from, place(p, tile + t, c), next);
        else for (int64_t j = 0; j < used; ++j) {
          vf d[kIn], r[kIn];
          each<kIn>([&](int q) __attribute__((always_inline)) { d[q] = load(from + q * kChannels + j * W); });
          Scheme::input(d, r);
          Stored* to = place(p, tile + t, c + j * W);
          each<kIn>([&](int q) __attribute__((always_inline)) { Op::keep(to + q * next, r[q], kIn * Op::kGroup * kLanes); });
        }
      }
  }

  // One tile and row of points as integers of a unit, which is returned: the largest value is kLargest. NaN where a value is
  // not finite, so that all of the tile's results are.
  static float integers(const float* from, Stored* to, int64_t next) {
    constexpr int vectors = kChannels / W;
    vf r[vectors][kIn];
    vi top = {};
    each<vectors>([&](int j) __attribute__((always_inline)) {
      vf d[kIn];
      each<kIn>([&](int q) __attribute__((always_inline)) { d[q] = load(from + q * kChannels + j * W); });
      Scheme::input(d, r[j]);
      each<kIn>([&](int q) __attribute__((always_inline)) {
        const vi size = reinterpret_cast<vi>(r[j][q]) & 0x7fffffff;  // as floats, and NaN above infinity
        top = size > top ? size : top;
      });
    });
    const float most = __builtin_bit_cast(float, largest(top)), unit = most * (1 / Op::kLargest);
    const bool finite = most - most == 0;
    const vf per_one = splat<vf>(finite && most > 1e-30f ? Op::kLargest / most : 0.0f);
    each<vectors>([&](int j) __attribute__((always_inline)) {
      each<kIn>([&](int q) __attribute__((always_inline)) { Op::keep(to + q * next + j * W, r[j][q] * per_one, 0); });
    });
    return finite ? unit : __builtin_nanf("");
  }

  // Channels c ... of the tile rows [begin, end) of a slab whose first row of tiles is number `first` of the batch.
  void into(int64_t first, int64_t begin, int64_t end, int64_t c) const {
    float* down = reinterpret_cast<float*>(kept_memory(1, (kIn * padded_cols() * kChannels + image_floats(slab_rows)) * 4));
    float* image = down + kIn * padded_cols() * kChannels;
    for (int64_t row = begin; row < end;) {
      const int64_t n = (first + row) / rows, r = (first + row) % rows, count = least(end - row, rows - r);
      const auto run = [&](auto normed, auto silu) {
        for (int64_t j = 0; j < kChannels; j += kVectorsIn * W)
          activate<decltype(normed)::value, decltype(silu)::value>(n, c + j, r * kOut - 1, count * kOut + 2, image + j);
      };
      if (!a.norm.weight) run(std::false_type{}, std::false_type{});
      else if (a.norm.silu) run(std::true_type{}, std::true_type{});
      else run(std::true_type{}, std::false_type{});
      for (int64_t i = 0; i < count; ++i)
        transform_in(image + i * kOut * padded_cols() * kChannels, down, c, (row + i) * cols);
      row += count;
    }
  }

  // Statistics of x where they are not given; then every sample's table.
  void normalise(char* memory) const {
    const GroupNormSilu& g = a.norm;
    const int64_t pieces = g.given_stats ? 1 : pieces_of(g), each_bytes = ChannelTable<float>::bytes(g.c);
    const double unit = g.silu ? kSiluUnit<float> : 1;
    const Scratch scratch(g.n * pieces * 2 * g.c * 8);
    const auto of = [&](int64_t i) { return reinterpret_cast<double*>(scratch.data) + i * pieces * 2 * g.c; };
    if (!g.given_stats) {
      const int64_t items = items_of<T>(g);
      parallel_for(g.n * items, grain_of(g.c * g.s / items), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) item_moments<T>(g, i / items, i % items, of(i / items));
      });
    }
    parallel_for(g.n, grain_of(8 * g.c), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const ChannelTable<float> table(memory + i * each_bytes, g.c);
        if (g.given_stats) {
          channel_maps<float>(g, i, of(i), table, unit);
          continue;
        }
        merge_pieces(g, of(i), pieces);
        group_statistics<float>(g, i, of(i));
        channel_maps<float>(g, i, 0, g.c, of(i), of(i) + g.c, table, unit);
      }
    });
  }
};

// What of a convolution does not depend on how its images are cut into tiles: norm and SiLU of x into a padded image, and
// work shared out among threads. Include inside a kernel file, after conv3x3_product.h.

constexpr int64_t kVectorsIn = 2;  // vectors of channels that are normalised at once

template <class T_, class Op_> struct Images {
  typedef T_ T;
  typedef Op_ Op;
  static constexpr int64_t kUnitIn = Op::kScaled ? kShared : 16;
  static constexpr int64_t kChannels = Op::kScaled ? kShared : kVectorsIn * W;  // of a task

  const Conv3x3& a;
  const int64_t width, words;      // stored channels of a tile in V; words that are summed
  const int64_t wide_o;            // output channels, those that fill the last unit included
  const int64_t breadth;           // columns of the padded image
  const float* factors = nullptr;  // of the input channels, where V is of integers
  const float* tables = nullptr;   // [n] of ChannelTable<float>

  Images(const Conv3x3& a_, int64_t breadth_)
      : a(a_), width(parts(a.norm.c, kUnitIn) * kUnitIn), words(parts(a.norm.c, Op::step)),
        wide_o(parts(a.o, kUnit) * kUnit), breadth(breadth_) {}

  static constexpr int64_t table_floats(int64_t c) { return ChannelTable<float>::bytes(c) / sizeof(float); }

  // Rows of pixels of channels c ... of sample n, kVectorsIn vectors, normalised, with a border of 0: the first
  // channels of image [height, breadth, kChannels].
  template <bool normed, bool silu> void activate(int64_t n, int64_t c, int64_t top, int64_t height, float* image) const {
    const ChannelTable<float> table(const_cast<char*>(reinterpret_cast<const char*>(tables + n * table_floats(a.norm.c))),
                                    a.norm.c);
    int some[kVectorsIn];
    vf m[kVectorsIn], slope[kVectorsIn], offset[kVectorsIn], factor[kVectorsIn];
    for (int j = 0; j < kVectorsIn; ++j) {
      some[j] = static_cast<int>(most(0, least(W, a.norm.c - c - j * W)));
      m[j] = slope[j] = offset[j] = vf{};
      if constexpr (Op::kScaled) factor[j] = load_some(factors + c + j * W, some[j]);
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
      float* out = image + i * breadth * kChannels;
      const int64_t r = top + i;
      const int64_t end = r < 0 || r >= a.h ? 0 : a.w;
      const auto zero = [&](int64_t col) {
        for (int j = 0; j < kVectorsIn; ++j) store(out + col * kChannels + j * W, vf{});
      };
      zero(0);
      for (int64_t s = end + 1; s < breadth; ++s) zero(s);
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

  // All kChannels of it.
  void fill(int64_t n, int64_t c, int64_t top, int64_t height, float* image) const {
    const auto run = [&](auto normed, auto silu) {
      for (int64_t j = 0; j < kChannels; j += kVectorsIn * W)
        activate<decltype(normed)::value, decltype(silu)::value>(n, c + j, top, height, image + j);
    };
    if (!a.norm.weight) run(std::false_type{}, std::false_type{});
    else if (a.norm.silu) run(std::true_type{}, std::true_type{});
    else run(std::true_type{}, std::false_type{});
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

  // Parts into which a slab's rows of tiles are cut so that its tasks occupy all threads.
  int64_t cuts(int64_t tile_rows, int64_t tasks) const {
    const int64_t workers = threads(), limit = least(tile_rows, workers);
    int64_t best = 1;
    double best_share = 0;
    for (int64_t cut = 1; cut <= limit; ++cut) {
      const int64_t all = cut * tasks;
      const double share = double(all) / double(parts(all, workers) * workers);
      if (share > best_share + 0.05) best = cut, best_share = share;
    }
    return best;
  }

  // task(begin row, end row, i) for i < tasks and the parts of the slab, or the whole of it.
  template <class F> void spread(int64_t tile_rows, int64_t tasks, bool whole, const F& task) const {
    const int64_t cut = whole ? 1 : cuts(tile_rows, tasks);
    parallel_for(cut * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        task(i / tasks * tile_rows / cut, (i / tasks + 1) * tile_rows / cut, i % tasks);
    });
  }
};

// group_norm_attention: one sample's memory, and x normalised into panels. Included by group_norm_attention.cpp.

// Sizes and memory of one sample's work, in words and stored elements of Op.
template <class Op> struct Sample {
  typedef typename Op::Word Word;
  typedef typename Op::Stored Stored;
  static constexpr int64_t lanes = kLanes<Op>;
  int64_t s, blocks, c, e, d, heads;  // c, e, d: words
  int64_t key_panels, row;            // packed k of a head has key_panels panels; a row of v has `row` elements
  int64_t panels_at, q_at, k_at, v_at, bytes;
  char* memory = nullptr;

  explicit Sample(const GroupNormAttention& a) : s(a.norm.s), blocks((s + lanes - 1) / lanes), heads(a.heads) {
    c = a.norm.c / Op::step, d = a.d / Op::step, e = heads * d;
    key_panels = (blocks * lanes + kTileRows - 1) / kTileRows;
    row = blocks * lanes + 64 / sizeof(Stored);  // rows of a power of two would share a cache set
    const auto words = [](int64_t n) { return (n * int64_t(sizeof(Word)) + 63) / 64 * 64; };
    panels_at = 0;  // of x, then of a
    q_at = panels_at + words((c > e ? c : e) * blocks * lanes);
    k_at = q_at + words(e * blocks * lanes);
    v_at = k_at + words(heads * key_panels * d * kTileRows);
    bytes = v_at + words(e * Op::step * row);
  }
  Word* panel(int64_t width, int64_t block, int64_t r = 0) const {
    return words_at(panels_at) + (block * width + r) * lanes;
  }
  Word* q(int64_t head, int64_t block, int64_t r = 0) const { return words_at(q_at) + (block * e + head * d + r) * lanes; }
  Word* k(int64_t head, int64_t panel, int64_t r = 0) const {
    return words_at(k_at) + ((head * key_panels + panel) * d + r) * kTileRows;
  }
  Stored* v(int64_t channel) const { return reinterpret_cast<Stored*>(memory + v_at) + channel * row; }

 private:
  Word* words_at(int64_t offset) const { return reinterpret_cast<Word*>(memory + offset); }
};

FD_INLINE int at_most(int64_t n, int limit) { return n < limit ? static_cast<int>(n) : limit; }

// ---- x to panels

template <class T, class Op>
void pack_planes(const GroupNormSilu& g, int64_t n, const ChannelTable<Acc<T>>& t, const Sample<Op>& m, int64_t block) {
  typedef typename Op::V V;
  constexpr int N = Tile<Op>::N;
  for (int64_t c = 0; c < g.c; c += Op::step)
    for (int j = 0; j < kVectors; ++j) {
      const int64_t p = block * m.lanes + j * N;
      const auto value = [&](int64_t k) __attribute__((always_inline)) {
        const T* x = g.x.at<const T>(n, k, p);
        const V v = p + N <= g.s ? load(x) : p < g.s ? load_some(x, static_cast<int>(g.s - p)) : V{};
        return fma(v - splat<V>(t.m[k]), splat<V>(t.a[k]), splat<V>(t.b[k]));
      };
      store(m.panel(m.c, block, c / Op::step) + j * N, Op::word(value(c), value(c + Op::step - 1)));
    }
}

// Channels-last: N pixels of N channels are turned over in registers.
template <class T, class Op>
void pack_rows(const GroupNormSilu& g, int64_t n, const ChannelTable<Acc<T>>& t, const Sample<Op>& m, int64_t block) {
  typedef typename Op::V V;
  constexpr int N = Tile<Op>::N;
  for (int64_t c = 0; c < g.c; c += N) {
    const int channels = at_most(g.c - c, N);
    const auto some = [&](const auto* p) __attribute__((always_inline)) {
      return channels == N ? load(p) : load_some(p, channels);
    };
    const V center = some(t.m + c), slope = some(t.a + c), offset = some(t.b + c);
    for (int j = 0; j < kVectors; ++j) {
      V r[N];
      for (int i = 0; i < N; ++i) {
        const int64_t p = block * m.lanes + j * N + i;
        r[i] = p < g.s ? fma(some(g.x.at<const T>(n, c, p)) - center, slope, offset) : V{};
      }
      transpose<typename Op::Word>(r);
      for (int i = 0; i < channels; i += Op::step)
        store(m.panel(m.c, block, (c + i) / Op::step) + j * N, Op::word(r[i], r[i + Op::step - 1]));
    }
  }
}

// Statistics where they are not given, then the coefficients of every channel.
template <class T, class Spread>
void maps(const GroupNormSilu& g, int64_t n, double* moments, const ChannelTable<Acc<T>>& table, const Spread& spread) {
  typedef Acc<T> A;
  if (!g.given_stats && g.x.s == 1) {
    const int64_t per = g.c / g.groups, size = per * g.s;
    spread(g.groups, size, [&](int64_t i, int64_t j) {
      for (; i < j; ++i) {
        Moments all;
        for (int64_t first = 0; first < size; first += kPiece)
          all.merge(group_moments<T>(g, n, i * per, first, first + kPiece < size ? first + kPiece : size));
        A* stats = stats_of<A>(g, n, i);
        stats[0] = static_cast<A>(all.mean), stats[1] = static_cast<A>(all.variance());
      }
    });
  } else if (!g.given_stats) {
    spread(items_of<T>(g), kPiece, [&](int64_t i, int64_t j) {
      for (; i < j; ++i) item_moments<T>(g, n, i, moments);
    });
    merge_pieces(g, moments, pieces_of(g));
    group_statistics<A>(g, n, moments);
    return channel_maps<A>(g, n, 0, g.c, moments, moments + g.c, table);
  }
  channel_maps<A>(g, n, moments, table);
}

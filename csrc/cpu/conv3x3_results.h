// The way back: results from the transformed domain, and the moments of what they become. Include inside a kernel file,
// after conv3x3_tiles.h.

// Of the results of a row of tiles: a vector of output channels.
struct RowMoments {
  vf mean = {}, m2 = {};  // m2: the sum of squared deviations
  float count = 0;
};

// What results y of a tile at (row, column) become: plus bias and residual, times out_scale, stored where the image has them.
// `some` output channels from o on; integers have a `unit` for each.
template <class T, bool scaled, int R, int C>
FD_INLINE void settle(const Conv3x3& a, int64_t n, int64_t o, int some, int64_t row, int64_t column, vf (&y)[R][C], vf bias,
                      vf unit, RowMoments& of) {
  const int64_t height = least(R, a.h - row), breadth = least(C, a.w - column), at = row * a.w + column;
  T* out = a.y.template at<T>(n, o, at);
  const T* add = a.residual ? a.residual.template at<const T>(n, o, at) : nullptr;
  const vf scale = splat<vf>(a.out_scale);
  vf total = {};
  const auto finish = [&](auto full) __attribute__((always_inline)) {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) {
        if (!decltype(full)::value && (i >= height || j >= breadth)) continue;
        const int64_t pixel = i * a.w + j;
        vf z = scaled ? fma(y[i][j], unit, bias) : y[i][j] + bias;
        const T* with = add + pixel * a.residual.s;
        if (add) z += decltype(full)::value ? load(with) : load_some(with, some);
        z *= scale;
        if (decltype(full)::value) store(out + pixel * a.y.s, z);
        else store_some(out + pixel * a.y.s, z, some);
        y[i][j] = z;
        total += z;
      }
  };
  const bool full = some == W && height == R && breadth == C;
  if (full) finish(std::true_type{});
  else finish(std::false_type{});
  if (!a.stats_groups) return;
  const float size = static_cast<float>(height * breadth), share = size / (of.count + size);
  const vf middle = total * (1 / size);
  vf spread = {};
  const auto deviate = [&](auto full) __attribute__((always_inline)) {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) {
        if (!decltype(full)::value && (i >= height || j >= breadth)) continue;
        const vf d = y[i][j] - middle;
        spread = fma(d, d, spread);
      }
  };
  if (full) deviate(std::true_type{});
  else deviate(std::false_type{});
  const vf delta = middle - of.mean;  // Chan
  of.mean = fma(delta, splat<vf>(share), of.mean);
  of.m2 += fma(delta * delta, splat<vf>(of.count * share), spread);
  of.count += size;
}

// Statistics of sample n of y from the moments of its rows of tiles, [n, rows, 2, wide_o], height_of(row) pixels high:
// channels, then groups, in double and in this order.
template <class H>
void finish_statistics(const Conv3x3& a, int64_t n, int64_t rows, const float* moments, int64_t wide_o, const H& height_of) {
  const int64_t per = a.o / a.stats_groups;
  const auto of = [&](int64_t r) { return moments + (n * rows + r) * 2 * wide_o; };
  const auto pixels = [&](int64_t r) { return double(height_of(r) * a.w); };
  const double size = double(a.h * a.w);
  for (int64_t g = 0; g < a.stats_groups; ++g) {
    double middle = 0, m2 = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t o = g * per; o < (g + 1) * per; ++o) sum += of(r)[o];
      middle += sum * (pixels(r) / (size * double(per)));
    }
    for (int64_t r = 0; r < rows; ++r) {
      double within = 0, between = 0;
      for (int64_t o = g * per; o < (g + 1) * per; ++o) {
        within += of(r)[wide_o + o];
        between += (of(r)[o] - middle) * (of(r)[o] - middle);
      }
      m2 += within + between * pixels(r);
    }
    float* out = a.stats + (n * a.stats_groups + g) * 2;
    out[0] = static_cast<float>(middle), out[1] = static_cast<float>(m2 / (size * double(per)));
  }
}

template <class T_, class Scheme_, class Op_> struct Results : Tiles<T_, Scheme_, Op_> {
  typedef Tiles<T_, Scheme_, Op_> Base;
  using typename Base::T, typename Base::Scheme, typename Base::Op;
  using Base::Base, Base::kIn, Base::kOut, Base::a, Base::rows, Base::cols, Base::wide_o;

  float* moments = nullptr;  // [n, rows, 2, wide_o]

  // A row of tiles, one vector of output channels: tiles' results from m [kPoints, tiles, block] at `m`.
  void row_out(int64_t n, int64_t r, int64_t o, const float* m, int64_t m_plane, int64_t block) const {
    const int some = static_cast<int>(most(0, least(W, a.o - o)));
    if (!some) return;
    vf unit = {};
    if constexpr (Op::kScaled) unit = load_some(this->units() + o, some);
    const vf bias = a.bias ? load_some(a.bias + n * a.bias_n + o, some) : vf{};
    RowMoments of;
    for (int64_t t = 0; t < cols; ++t, m += block) {
      vf half[kOut][kIn], y[kOut][kOut];
      each<kIn>([&](int q) __attribute__((always_inline)) {
        vf d[kIn], e[kOut];
        each<kIn>([&](int p) __attribute__((always_inline)) { d[p] = load(m + (p * kIn + q) * m_plane); });
        Scheme::output(d, e);
        each<kOut>([&](int i) __attribute__((always_inline)) { half[i][q] = e[i]; });
      });
      each<kOut>([&](int i) __attribute__((always_inline)) { Scheme::output(half[i], y[i]); });
      settle<T, Op::kScaled>(a, n, o, some, r * kOut, t * kOut, y, bias, unit, of);
    }
    if (!a.stats_groups) return;
    float* kept = moments + (n * rows + r) * 2 * wide_o + o;
    store(kept, of.mean), store(kept + wide_o, of.m2);
  }
};

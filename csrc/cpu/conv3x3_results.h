// The way back: results from the transformed domain, and the moments of what they become. Include inside a kernel file,
// after conv3x3_tiles.h.

template <class T_, class Scheme_, class Op_> struct Results : Tiles<T_, Scheme_, Op_> {
  typedef Tiles<T_, Scheme_, Op_> Base;
  using typename Base::T, typename Base::Scheme;
  using Base::Base, Base::kIn, Base::kOut, Base::a, Base::rows, Base::cols, Base::wide_o;

  float* moments = nullptr;  // [n, rows, 2, wide_o]: mean and sum of squared deviations of a row of tiles

  // A row of tiles, one vector of output channels: tiles' results from m [kPoints, tiles, block] at `m`.
  void row_out(int64_t n, int64_t r, int64_t o, const float* m, int64_t m_plane, int64_t block) const {
    const int some = static_cast<int>(most(0, least(W, a.o - o)));
    [[maybe_unused]] vf unit = {};
    if constexpr (Base::Op::kScaled) unit = load_some(this->units() + o, some);
    const vf bias = a.bias && some ? load_some(a.bias + n * a.bias_n + o, some) : vf{}, scale = splat<vf>(a.out_scale);
    const int64_t height = least(kOut, a.h - r * kOut);
    vf mean = {}, m2 = {};
    float count = 0;
    for (int64_t t = 0; t < cols && some; ++t, m += block) {
      const int64_t breadth = least(kOut, a.w - t * kOut);
      vf half[kOut][kIn], y[kOut][kOut];
      each<kIn>([&](int q) __attribute__((always_inline)) {
        vf d[kIn], e[kOut];
        each<kIn>([&](int p) __attribute__((always_inline)) { d[p] = load(m + (p * kIn + q) * m_plane); });
        Scheme::output(d, e);
        each<kOut>([&](int i) __attribute__((always_inline)) { half[i][q] = e[i]; });
      });
      each<kOut>([&](int i) __attribute__((always_inline)) { Scheme::output(half[i], y[i]); });
      const int64_t at = r * kOut * a.w + t * kOut;
      T* out = a.y.template at<T>(n, o, at);
      const T* add = a.residual ? a.residual.template at<const T>(n, o, at) : nullptr;
      vf total = {};
      const auto finish = [&](auto full) __attribute__((always_inline)) {
        for (int i = 0; i < kOut; ++i)
          for (int j = 0; j < kOut; ++j) {
            if (!decltype(full)::value && (i >= height || j >= breadth)) continue;
            const int64_t pixel = i * a.w + j;
            vf z = Base::Op::kScaled ? fma(y[i][j], unit, bias) : y[i][j] + bias;
            const T* with = add + pixel * a.residual.s;
            if (add) z += decltype(full)::value ? load(with) : load_some(with, some);
            z *= scale;
            if (decltype(full)::value) store(out + pixel * a.y.s, z);
            else store_some(out + pixel * a.y.s, z, some);
            y[i][j] = z;
            total += z;
          }
      };
      const bool full = some == W && height == kOut && breadth == kOut;
      if (full) finish(std::true_type{});
      else finish(std::false_type{});
      if (!a.stats_groups) continue;
      const float size = static_cast<float>(height * breadth), share = size / (count + size);
      const vf middle = total * (1 / size);
      vf spread = {};
      const auto deviate = [&](auto full) __attribute__((always_inline)) {
        for (int i = 0; i < kOut; ++i)
          for (int j = 0; j < kOut; ++j) {
            if (!decltype(full)::value && (i >= height || j >= breadth)) continue;
            const vf d = y[i][j] - middle;
            spread = fma(d, d, spread);
          }
      };
      if (full) deviate(std::true_type{});
      else deviate(std::false_type{});
      const vf delta = middle - mean;  // Chan
      mean = fma(delta, splat<vf>(share), mean);
      m2 += fma(delta * delta, splat<vf>(count * share), spread);
      count += size;
    }
    if (!a.stats_groups || !some) return;
    float* kept = moments + (n * rows + r) * 2 * wide_o + o;
    store(kept, mean), store(kept + wide_o, m2);
  }

  // Statistics of y from its rows of tiles: channels, then groups, in double and in this order.
  void finish_statistics(int64_t n) const {
    const int64_t per = a.o / a.stats_groups;
    const auto of = [&](int64_t r) { return moments + (n * rows + r) * 2 * wide_o; };
    const auto pixels = [&](int64_t r) { return double(least(kOut, a.h - r * kOut) * a.w); };
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
};

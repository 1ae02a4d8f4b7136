// conv3x3 by Winograd's algorithm. Formula: fastdiff/ops/conv3x3.py; the algorithm's story: docs/conv3x3.md.
//
// A sample's image is cut into tiles of kOut x kOut results. For a slab of some rows of tiles: norm and SiLU of x into a
// padded image of a few channels, B^T d B of its tiles into kIn^2 matrices V [tiles, channels]; then for every block of 64
// output channels kIn^2 products V U, A^T m A of the results, bias, residual, scale, statistics. A result is one sum in
// the order of the channels, statistics are taken a row of tiles at a time: neither depends on batch, slabs or threads.
#ifndef FASTDIFF_ISA

#include "cpu/conv3x3.h"

#include <memory>
#define FASTDIFF_KERNELS "cpu/conv3x3.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void conv3x3(const Conv3x3& a, Winograd algorithm) {
#define FASTDIFF_ARGUMENTS a, algorithm
  FASTDIFF_DISPATCH(conv3x3, FASTDIFF_ARGUMENTS);
}

char* kept_memory(int which, int64_t bytes) {
  thread_local std::unique_ptr<Scratch> kept[2];
  thread_local int64_t size[2] = {};
  if (size[which] < bytes) {
    kept[which].reset();
    size[which] = 0;
    kept[which] = std::make_unique<Scratch>(bytes);
    size[which] = bytes;
  }
  return kept[which]->data;
}
}  // namespace fastdiff

#else

#include "cpu/group_norm.h"

#include "cpu/conv3x3_product.h"
#include "cpu/conv3x3_transforms.h"

constexpr int64_t kLine = 16;      // floats of a cache line
constexpr int64_t kSlab = 64;      // tiles of a slab, at least a row of them: V stays in L2 or near it
constexpr int64_t kVectorsIn = 2;  // vectors of channels that the input transform takes at once
constexpr int64_t kChannels = kVectorsIn * W;

FD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FD_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FD_INLINE int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

template <class T_, class Scheme_, class Op_> struct Winning {
  typedef T_ T;
  typedef Scheme_ Scheme;
  typedef Op_ Op;
  typedef typename Op::Stored Stored;
  static constexpr int kIn = Scheme::kIn, kOut = Scheme::kOut, kPoints = kIn * kIn;

  const Conv3x3& a;
  const bool lean;                // packed weights are the filters themselves
  const int64_t rows, cols;       // tiles of an image
  const int64_t width, words;     // stored channels of a tile in V; words that are summed
  int64_t slab_rows, images;      // of a slab: rows of tiles, of how many images (1 where an image has several slabs)
  int64_t plane;                  // stored elements of one of V's matrices, odd in cache lines
  const float* tables = nullptr;  // [n] of ChannelTable<float>
  float* moments = nullptr;       // [n, rows, 2, wide_o]: mean and sum of squared deviations of a row of tiles
  int64_t wide_o;
  Stored* v = nullptr;

  explicit Winning(const Conv3x3& a_, bool lean_ = false)
      : a(a_), lean(lean_), rows(parts(a.h, kOut)), cols(parts(a.w, kOut)), width(parts(a.norm.c, 16) * 16),
        words(parts(a.norm.c, Op::step)), wide_o(parts(a.o, kUnit) * kUnit) {
    const int64_t fit = most(1, kSlab / cols);
    images = rows >= fit ? 1 : least(fit / rows, a.norm.n);
    slab_rows = rows > fit ? parts(rows, parts(rows, fit)) : rows;
    plane = images * slab_rows * cols * width + 64 / static_cast<int64_t>(sizeof(Stored)) * 2;
  }

  // ---- into the transformed domain

  static constexpr int64_t table_floats(int64_t c) { return ChannelTable<float>::bytes(c) / sizeof(float); }
  int64_t padded_cols() const { return cols * kOut + 2; }
  int64_t image_floats(int64_t tile_rows) const { return (tile_rows * kOut + 2) * padded_cols() * kChannels; }

  // Rows of pixels of channels c ... of sample n, normalised, with a border of zeros: image [height, padded_cols, kChannels].
  template <bool normed, bool silu> void activate(int64_t n, int64_t c, int64_t top, int64_t height, float* image) const {
    const ChannelTable<float> table(const_cast<char*>(reinterpret_cast<const char*>(tables + n * table_floats(a.norm.c))),
                                    a.norm.c);
    int some[kVectorsIn];
    vf m[kVectorsIn], slope[kVectorsIn], offset[kVectorsIn];
    for (int j = 0; j < kVectorsIn; ++j) {
      some[j] = static_cast<int>(most(0, least(W, a.norm.c - c - j * W)));
      m[j] = slope[j] = offset[j] = vf{};
      if (!normed || !some[j]) continue;
      m[j] = load_some(table.m + c + j * W, some[j]), slope[j] = load_some(table.a + c + j * W, some[j]);
      offset[j] = load_some(table.b + c + j * W, some[j]);
    }
    const auto value = [&](vf x, int j) __attribute__((always_inline)) {
      if constexpr (normed) x = fma(x - m[j], slope[j], offset[j]);
      if constexpr (normed && silu) x = divide<kRough<T>>(x, inverse_sigmoid<kRough<T>>(x));
      return x;
    };
    const bool whole = some[kVectorsIn - 1] == W;
    for (int64_t i = 0; i < height; ++i) {
      float* out = image + i * padded_cols() * kChannels;
      const int64_t r = top + i;
      const int64_t end = r < 0 || r >= a.h ? 0 : a.w;
      const auto zero = [&](int64_t col) { for (int j = 0; j < kVectorsIn; ++j) store(out + col * kChannels + j * W, vf{}); };
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
    const int64_t used = least(kVectorsIn, parts(width - c, W));
    for (int p = 0; p < kIn; ++p)
      for (int64_t t = 0; t < cols; ++t)
        for (int64_t j = 0; j < used; ++j) {
          const float* from = down + p * line + t * kOut * kChannels + j * W;
          Stored* to = v + p * kIn * plane + (tile + t) * width + c + j * W;
          vf d[kIn], r[kIn];
          each<kIn>([&](int q) __attribute__((always_inline)) { d[q] = load(from + q * kChannels); });
          Scheme::input(d, r);
          each<kIn>([&](int q) __attribute__((always_inline)) { Op::keep(to + q * plane, r[q]); });
        }
  }

  // Channels c ... of the tile rows [begin, end) of a slab whose first row of tiles is number `first` of the batch.
  void into(int64_t first, int64_t begin, int64_t end, int64_t c) const {
    float* down = reinterpret_cast<float*>(kept_memory(1, (kIn * padded_cols() * kChannels + image_floats(slab_rows)) * 4));
    float* image = down + kIn * padded_cols() * kChannels;
    for (int64_t row = begin; row < end;) {
      const int64_t n = (first + row) / rows, r = (first + row) % rows, count = least(end - row, rows - r);
      const auto run = [&](auto normed, auto silu) {
        activate<decltype(normed)::value, decltype(silu)::value>(n, c, r * kOut - 1, count * kOut + 2, image);
      };
      if (!a.norm.weight) run(std::false_type{}, std::false_type{});
      else if (a.norm.silu) run(std::true_type{}, std::true_type{});
      else run(std::true_type{}, std::false_type{});
      for (int64_t i = 0; i < count; ++i)
        transform_in(image + i * kOut * padded_cols() * kChannels, down, c, (row + i) * cols);
      row += count;
    }
  }

  // ---- products

  // One point's m [tiles, block] += V [tiles, depth] u [depth, block], from word k on; fetches `size` floats from `ahead` on.
  void product(int p, int64_t tile, int64_t tiles, const float* u, int64_t block, int64_t k, int64_t depth, float* m,
               const float* ahead, int64_t size) const {
    const int64_t runs = parts(tiles, Op::kRows), row = width / Op::step, calls = runs * parts(block, Op::kVectors * W);
    const auto* from = reinterpret_cast<const float*>(v + p * plane + tile * width) + k;
    int64_t call = 0;
    const int64_t want = parts(size, calls * depth), stride = least(want, kLine);
    for (int64_t o = 0; o < block; o += Op::kVectors * W) {
      const int vectors = static_cast<int>(least(Op::kVectors, (block - o) / W));
      for (int64_t i = 0; i < runs; ++i, ++call) {
        const int64_t t = i * tiles / runs, count = (i + 1) * tiles / runs - t;
        multiply_of<Op>(static_cast<int>(count), vectors)(from + t * row, row, u + o, block, depth, m + t * block + o, block,
                                                          k > 0, ahead + call * depth * stride, stride);
      }
    }
  }

  static constexpr int64_t u_plane(int64_t depth, int64_t block) { return depth * block + 32; }  // no two in one cache set

  // u [kIn, depth, block]: the filters' values at one row of points, from `taps` [depth, 9, block].
  template <int point> void filters(const float* taps, int64_t depth, int64_t block, float* u) const {
    for (int64_t k = 0; k < depth; ++k, taps += 9 * block, u += block)
      for (int64_t o = 0; o < block; o += W) {
        vf g[3], r[kIn];
        each<3>([&](int j) __attribute__((always_inline)) {
          const auto tap = [&](int i) __attribute__((always_inline)) { return load(taps + (3 * i + j) * block + o); };
          g[j] = Scheme::template filter_at<point>(tap(0), tap(1), tap(2));
        });
        Scheme::filter(g[0], g[1], g[2], r);
        each<kIn>([&](int q) __attribute__((always_inline)) { store(u + q * u_plane(depth, block) + o, r[q]); });
      }
  }

  // m [kPoints, tiles, block] = V of `tiles` tiles from number `tile` on, times a block of weights.
  void products(int64_t tile, int64_t tiles, int64_t first_o, int64_t block, float* m, int64_t m_plane, float* u) const {
    if (lean) return products_of_filters(tile, tiles, first_o, block, m, m_plane, u);
    const float* panel = static_cast<const float*>(a.packed) + kPoints * words * first_o;
    for (int p = 0; p < kPoints; ++p)
      for (int64_t k = 0; k < words; k += kDepth) {
        const int64_t depth = least(kDepth, words - k);
        product(p, tile, tiles, panel, block, k, depth, m + p * m_plane, panel + depth * block, depth * block);
        panel += depth * block;
      }
  }

  // The same from the filters, evaluated a row of points at a time into u.
  void products_of_filters(int64_t tile, int64_t tiles, int64_t first_o, int64_t block, float* m, int64_t m_plane,
                           float* u) const {
    if constexpr (std::is_same_v<Scheme, Four>) {
      const float* taps = static_cast<const float*>(a.packed) + 9 * words * first_o;
      for (int64_t k = 0; k < words; k += kFilterDepth, taps += 9 * kFilterDepth * block) {
        const int64_t depth = least(kFilterDepth, words - k), share = 9 * depth * block / kPoints;
        const auto row = [&](auto point) {
          constexpr int p = decltype(point)::value;
          filters<p>(taps, depth, block, u);
          for (int i = p * kIn; i < (p + 1) * kIn; ++i)
            product(i, tile, tiles, u + i % kIn * u_plane(depth, block), block, k, depth, m + i * m_plane,
                    taps + 9 * depth * block + share * i, share);
        };
        [&]<int... p>(std::integer_sequence<int, p...>) {
          (row(std::integral_constant<int, p>{}), ...);
        }(std::make_integer_sequence<int, kIn>{});
      }
    }
  }

  // ---- and back

  // A row of tiles, one vector of output channels: tiles' results from m [kPoints, tiles, block] at `m`.
  void row_out(int64_t n, int64_t r, int64_t o, const float* m, int64_t m_plane, int64_t block) const {
    const int some = static_cast<int>(most(0, least(W, a.o - o)));
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
            vf z = y[i][j] + bias;
            if (add) z += decltype(full)::value ? load(add + pixel * a.residual.s) : load_some(add + pixel * a.residual.s, some);
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

  // Output channels first_o ... of the tile rows [begin, end) of the slab that starts at row `first`.
  void out_of(int64_t first, int64_t begin, int64_t end, int64_t first_o) const {
    const int64_t block = least(kBlock, wide_o - first_o), tiles = (end - begin) * cols, m_plane = tiles * block + 32;
    float* m = reinterpret_cast<float*>(kept_memory(1, (kPoints * m_plane + (lean ? kIn * u_plane(kFilterDepth, kBlock) : 0)) * 4));
    products(begin * cols, tiles, first_o, block, m, m_plane, m + kPoints * m_plane);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t o = 0; o < block; o += W)
        row_out((first + row) / rows, (first + row) % rows, first_o + o, m + (row - begin) * cols * block + o, m_plane, block);
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

  // task(begin row, end row, i) for i < tasks and the parts of the slab.
  template <class F> void spread(int64_t tile_rows, int64_t tasks, const F& task) const {
    const int64_t cut = cuts(tile_rows, tasks);
    parallel_for(cut * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        task(i / tasks * tile_rows / cut, (i / tasks + 1) * tile_rows / cut, i % tasks);
    });
  }

  void run() {
    const int64_t n = a.norm.n, total = n * rows, per_image = parts(rows, slab_rows);
    const int64_t slabs = images > 1 ? parts(n, images) : n * per_image;
    const int64_t v_bytes = aligned(kPoints * plane * sizeof(Stored)), table_bytes = n * ChannelTable<float>::bytes(a.norm.c);
    const int64_t moment_bytes = a.stats_groups ? total * 2 * wide_o * 4 : 0;
    char* memory = kept_memory(0, v_bytes + table_bytes + moment_bytes);
    v = reinterpret_cast<Stored*>(memory);
    tables = reinterpret_cast<float*>(memory + v_bytes);
    moments = reinterpret_cast<float*>(memory + v_bytes + table_bytes);
    if (a.norm.weight) normalise(memory + v_bytes);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t first = images > 1 ? slab * images * rows : slab / per_image * rows + slab % per_image * slab_rows;
      const int64_t last = images > 1 ? least(total, first + images * rows)
                                      : least((slab / per_image + 1) * rows, first + slab_rows);
      spread(last - first, parts(a.norm.c, kChannels),
             [&](int64_t begin, int64_t end, int64_t i) { into(first, begin, end, i * kChannels); });
      spread(last - first, parts(a.o, kBlock),
             [&](int64_t begin, int64_t end, int64_t i) { out_of(first, begin, end, i * kBlock); });
    }
    if (a.stats_groups)
      parallel_for(n, grain_of(rows * a.o), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) finish_statistics(i);
      });
  }

  // Statistics of x where they are not given; then every sample's table.
  void normalise(char* memory) const {
    const GroupNormSilu& g = a.norm;
    const int64_t pieces = g.given_stats ? 1 : pieces_of(g), each_bytes = ChannelTable<float>::bytes(g.c);
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
          channel_maps<float>(g, i, of(i), table);
          continue;
        }
        merge_pieces(g, of(i), pieces);
        group_statistics<float>(g, i, of(i));
        channel_maps<float>(g, i, 0, g.c, of(i), of(i) + g.c, table);
      }
    });
  }
};

template <class T> void run_winograd(const Conv3x3& a, Winograd algorithm) {
  if constexpr (std::is_same_v<T, double>) return;
  else {
#if FASTDIFF_LEVEL >= 3
    if (algorithm == Winograd::f2) return Winning<T, Two, Pairs>(a).run();
#endif
    if (algorithm != Winograd::f2) Winning<T, Four, Floats>(a, algorithm == Winograd::f4_lean).run();
  }
}

inline void conv3x3(const Conv3x3& a, Winograd algorithm) {
  with_dtype(a.norm.x.dtype, [&](auto t) { run_winograd<decltype(t)>(a, algorithm); });
}

#endif

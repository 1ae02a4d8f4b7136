// conv3x3 by Winograd's algorithm with tiles of 6 and of 4 results a side: see conv3x3.cpp, docs/conv3x3.md.
//
// A side of 32 is four tiles of 6 and two of 4, which have 44 points, where eight of 4 have 48: 1.89 products a result, not
// 2.25. A tile has the first 6 or all 8 rows, and columns, of points; each is a product over the tiles that have it.
// Filters are evaluated as they are multiplied. Sums are taken kSummed channels at a time, which halves their rounding.
#ifndef FASTDIFF_ISA

#include "cpu/conv3x3.h"

#define FASTDIFF_KERNELS "cpu/conv3x3_nested.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void conv3x3_nested(const Conv3x3& a) {
#define FASTDIFF_ARGUMENTS a
  FASTDIFF_DISPATCH(conv3x3_nested, FASTDIFF_ARGUMENTS);
}
}  // namespace fastdiff

#elif FASTDIFF_LEVEL < 2

inline void conv3x3_nested(const Conv3x3&) {}  // refused before: 24 sums take 32 registers

#else

#include "cpu/group_norm.h"

#include "cpu/conv3x3_transforms.h"

#include "cpu/conv3x3_product.h"

#include "cpu/conv3x3_image.h"

#include "cpu/conv3x3_tiles.h"

#include "cpu/conv3x3_results.h"

#include "cpu/conv3x3_nested_product.h"

constexpr int64_t kSummed = 32;        // channels summed in registers
constexpr int64_t kSlabPoints = 2304;  // of a slab, at least a row of tiles: V stays near L2
constexpr int kPoints = 8;             // in one dimension

// A side cut into tiles of 6, then of 4, with the fewest points.
struct Cut {
  int64_t sixes, fours;
  explicit Cut(int64_t size) : sixes(0), fours(parts(size, 4)) {
    for (int64_t six = 1; six <= parts(size, 6); ++six) {
      const int64_t four = parts(most(0, size - 6 * six), 4);
      if (8 * six + 6 * four < points()) sixes = six, fours = four;
    }
  }
  int64_t count() const { return sixes + fours; }
  int64_t points() const { return 8 * sixes + 6 * fours; }
  int64_t size(int64_t i) const { return i < sixes ? 6 : 4; }
  int64_t at(int64_t i) const { return 6 * least(i, sixes) + 4 * most(0, i - sixes); }
};

struct Nesting : Images<float, Filters> {
  typedef Images<float, Filters> Base;

  const Cut down, across;
  const int64_t rows, cols;  // tiles of an image
  int64_t slab_rows;         // rows of tiles of a slab
  int64_t plane, m_plane;    // floats of a row of points in V and in M, odd in cache lines
  float* v = nullptr;
  float* moments = nullptr;  // [n, rows, 2, wide_o]

  explicit Nesting(const Conv3x3& a_)
      : Base(a_, Cut(a_.w).at(Cut(a_.w).count()) + 2), down(a_.h), across(a_.w), rows(down.count()), cols(across.count()) {
    const int64_t fit = most(1, kSlabPoints / (kPoints * across.points()));
    slab_rows = parts(rows, parts(rows, fit));
    const Slab largest(*this, 0, slab_rows);
    plane = kLine, m_plane = kLine;
    for (int kind = 0; kind < kKinds; ++kind) {
      plane += largest.of[0][kind].groups() * width * kSums;
      m_plane += largest.of[0][kind].tiles * points_of(kind) * W;
    }
  }

  // Tiles that have a row of points and columns of a kind: in groups, as even as they can be.
  struct Tiling {
    int64_t in_row = 0, tiles = 0, group = 1, v_at = 0, m_at = 0;
    int64_t groups() const { return parts(tiles, group); }
  };

  // Rows of tiles [first, last) of an image; the tilings of rows of points that all of them have, and of those of six alone.
  struct Slab {
    int64_t first, last, sixes;
    Tiling of[2][kKinds];

    Slab(const Nesting& w, int64_t first_, int64_t last_)
        : first(first_), last(last_), sixes(most(0, least(last_, w.down.sixes) - first_)) {
      for (int which = 0; which < 2; ++which) {
        int64_t v_at = 0;
        for (int kind = 0; kind < kKinds; ++kind) {
          Tiling& t = of[which][kind];
          t.in_row = kind == kEither ? w.cols : kind == kSix ? w.across.sixes : w.across.fours;
          t.tiles = (which ? sixes : last - first) * t.in_row;
          t.group = most(1, parts(t.tiles, most(1, parts(t.tiles, most_tiles(kind)))));
          t.v_at = v_at, v_at += t.groups() * w.width * kSums;
          if (kind) t.m_at = of[0][kind - 1].m_at + of[0][kind - 1].tiles * points_of(kind - 1) * W;
        }
      }
    }
    const Tiling& tiling(int point, int kind) const { return of[point >= 6][kind]; }
  };

  // Where V has the first of a kind's points of tile t, from channel c on; the next is kLanes further.
  float* place(const Tiling& tiling, int kind, int p, int64_t t, int64_t c) const {
    return v + p * plane + tiling.v_at + t / tiling.group * width * kSums + c * kSums +
           t % tiling.group * points_of(kind) * kLanes;
  }

  // A row of tiles, of R pixels, of the padded image: down its columns into `half` [R + 2, breadth, kChannels], then along
  // the rows into V.
  template <int R> void transform_in(const Slab& slab, int64_t row, const float* image, float* half, int64_t c) const {
    const int64_t line = breadth * kChannels;
    for (int64_t i = 0; i < line; i += W) {
      vf d[R + 2], r[R + 2];
      each<R + 2>([&](int p) __attribute__((always_inline)) { d[p] = load(image + p * line + i); });
      Nested<R>::input(d, r);
      each<R + 2>([&](int p) __attribute__((always_inline)) { store(half + p * line + i, r[p]); });
    }
    const int64_t used = least(kChannels / W, parts(a.norm.c - c, W));
    for (int p = 0; p < R + 2; ++p)
      for (int64_t t = 0; t < cols; ++t) {
        const float* from = half + p * line + across.at(t) * kChannels;
        if (t < across.sixes) along<6>(slab, row, p, t, from, c, used);
        else along<4>(slab, row, p, t, from, c, used);
      }
  }
  template <int C>
  void along(const Slab& slab, int64_t row, int p, int64_t t, const float* from, int64_t c, int64_t used) const {
    constexpr int kind = C == 6 ? kSix : kFour;
    const int64_t i = C == 6 ? t : t - across.sixes;
    const Tiling &either = slab.tiling(p, kEither), &own = slab.tiling(p, kind);
    float* to = place(either, kEither, p, (row - slab.first) * either.in_row + t, c);
    float* more = place(own, kind, p, (row - slab.first) * own.in_row + i, c);
    for (int64_t j = 0; j < used; ++j, to += W * kSums, more += W * kSums) {
      vf d[C + 2], r[C + 2];
      each<C + 2>([&](int q) __attribute__((always_inline)) { d[q] = load(from + q * kChannels + j * W); });
      Nested<C>::input(d, r);
      each<4>([&](int q) __attribute__((always_inline)) { Filters::keep(to + q * kLanes, r[q], kLanes * kSums); });
      each<C - 2>([&](int q) __attribute__((always_inline)) { Filters::keep(more + q * kLanes, r[4 + q], kLanes * kSums); });
    }
  }

  // Channels c ... of the slab's rows of tiles [begin, end), counted from its first.
  void into(int64_t n, const Slab& slab, int64_t begin, int64_t end, int64_t c) const {
    const int64_t first = slab.first + begin, last = slab.first + end, top = down.at(first);
    const int64_t line = breadth * kChannels, height = down.at(last) - top + 2;
    float* half = reinterpret_cast<float*>(kept_memory(1, (kPoints + 6 * slab_rows + 2) * line * 4));
    float* image = half + kPoints * line;
    fill(n, c, top - 1, height, image);
    for (int64_t row = first; row < last; ++row) {
      const float* from = image + (down.at(row) - top) * line;
      if (row < down.sixes) transform_in<6>(slab, row, from, half, c);
      else transform_in<4>(slab, row, from, half, c);
    }
  }

  // The three columns of `depth` filters at the rows of points from the third on: [6, depth, 3, W].
  static void evaluate(const float* taps, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; ++k, taps += 9 * W, to += 3 * W)
      each<3>([&](int j) __attribute__((always_inline)) {
        vf u[4], more[4];
        const vf g0 = load(taps + j * W), g1 = load(taps + (3 + j) * W), g2 = load(taps + (6 + j) * W);
        values<kEither>(g0, g1, g2, u), values<kSix>(g0, g1, g2, more);
        each<6>([&](int p) __attribute__((always_inline)) {
          store(to + (p * kSummed * 3 + j) * W, p < 2 ? u[p + 2] : more[p - 2]);
        });
      });
  }

  // Products of a kind's columns of points in row p, channels k ... k + depth; where the fetching ahead has come to.
  template <int kind>
  const float* multiply(const Slab& slab, int p, int64_t k, int64_t depth, const float* rows, int64_t rows_stride, float* m,
                        const float* ahead, int64_t share) const {
    const Tiling& tiling = slab.tiling(p, kind);
    constexpr int64_t size = points_of(kind) * W;
    for (int64_t t = 0; t < tiling.tiles; t += tiling.group, ahead += share * depth)
      multiply_nested_of<kind>(least(tiling.group, tiling.tiles - t))(place(tiling, kind, p, t, k), rows, rows_stride, depth,
                                                                      m + p * m_plane + tiling.m_at + t * size, k > 0, ahead,
                                                                      share);
    return ahead;
  }

  // A unit of output channels of a slab.
  void out_of(int64_t n, const Slab& slab, int64_t o) const {
    float* m = reinterpret_cast<float*>(kept_memory(1, (kPoints * m_plane + kSummed * 18 * W) * 4));
    float* values = m + kPoints * m_plane;
    const float* taps = static_cast<const float*>(a.packed) + 9 * words * o;
    int64_t calls = 0;
    for (int p = 0; p < kPoints; ++p)
      for (int kind = 0; kind < kKinds; ++kind) calls += slab.tiling(p, kind).groups();
    const int64_t share = parts(9 * W, calls);
    for (int64_t k = 0, depth; k < words; k += depth, taps += 9 * W * depth) {
      depth = least(kSummed, words - k);
      const float* ahead = taps + 9 * W * depth;
      evaluate(taps, depth, values);
      for (int p = 0; p < kPoints && slab.tiling(p, kEither).tiles; ++p) {
        // at 0 and infinity a filter's columns are what they are
        const float* columns = p < 2 ? taps + p * 6 * W : values + (p - 2) * kSummed * 3 * W;
        const int64_t stride = p < 2 ? 9 * W : 3 * W;
        ahead = multiply<kEither>(slab, p, k, depth, columns, stride, m, ahead, share);
        ahead = multiply<kSix>(slab, p, k, depth, columns, stride, m, ahead, share);
        ahead = multiply<kFour>(slab, p, k, depth, columns, stride, m, ahead, share);
      }
    }
    for (int64_t row = slab.first; row < slab.last; ++row)
      if (row < down.sixes) row_out<6>(n, slab, row, o, m);
      else row_out<4>(n, slab, row, o, m);
  }

  // A row of tiles of R pixels, one vector of output channels.
  template <int R> void row_out(int64_t n, const Slab& slab, int64_t row, int64_t o, const float* m) const {
    const int some = static_cast<int>(least(W, a.o - o));
    const vf bias = a.bias ? load_some(a.bias + n * a.bias_n + o, some) : vf{};
    RowMoments of;
    for (int64_t t = 0; t < cols; ++t)
      if (t < across.sixes) tile_out<R, 6>(n, slab, row, t, o, some, m, bias, of);
      else tile_out<R, 4>(n, slab, row, t, o, some, m, bias, of);
    if (!a.stats_groups) return;
    float* kept = moments + (n * rows + row) * 2 * wide_o + o;
    store(kept, of.mean), store(kept + wide_o, of.m2);
  }
  template <int R, int C>
  void tile_out(int64_t n, const Slab& slab, int64_t row, int64_t t, int64_t o, int some, const float* m, vf bias,
                RowMoments& of) const {
    constexpr int kind = C == 6 ? kSix : kFour;
    const Tiling &either = slab.of[0][kEither], &own = slab.of[0][kind];
    const int64_t r = row - slab.first, i = C == 6 ? t : t - across.sixes;
    const float* first = m + either.m_at + (r * either.in_row + t) * points_of(kEither) * W;
    const float* more = m + own.m_at + (r * own.in_row + i) * points_of(kind) * W;
    vf half[R][C + 2], y[R][C];
    each<C + 2>([&](int q) __attribute__((always_inline)) {
      vf d[R + 2], e[R];
      const float* from = q < 4 ? first + q * W : more + (q - 4) * W;
      each<R + 2>([&](int p) __attribute__((always_inline)) { d[p] = load(from + p * m_plane); });
      Nested<R>::output(d, e);
      each<R>([&](int j) __attribute__((always_inline)) { half[j][q] = e[j]; });
    });
    each<R>([&](int j) __attribute__((always_inline)) { Nested<C>::output(half[j], y[j]); });
    settle<float, false>(a, n, o, some, down.at(row), across.at(t), y, bias, vf{}, of);
  }

  void run() {
    const int64_t n = a.norm.n, v_bytes = aligned(kPoints * plane * 4);
    const int64_t table_bytes = n * ChannelTable<float>::bytes(a.norm.c);
    char* memory = kept_memory(0, v_bytes + table_bytes + (a.stats_groups ? n * rows * 2 * wide_o * 4 : 0));
    v = reinterpret_cast<float*>(memory);
    tables = reinterpret_cast<float*>(memory + v_bytes);
    moments = reinterpret_cast<float*>(memory + v_bytes + table_bytes);
    if (a.norm.weight) normalise(memory + v_bytes);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t first = 0; first < rows; first += slab_rows) {
        const Slab slab(*this, first, least(rows, first + slab_rows));
        spread(slab.last - first, parts(a.norm.c, kChannels), false,
               [&](int64_t begin, int64_t end, int64_t c) { into(i, slab, begin, end, c * kChannels); });
        spread(slab.last - first, parts(a.o, W), true, [&](int64_t, int64_t, int64_t unit) { out_of(i, slab, unit * W); });
      }
    if (a.stats_groups)
      parallel_for(n, grain_of(rows * a.o), [&](int64_t begin, int64_t end) {
        const auto height = [&](int64_t r) { return least(down.size(r), a.h - down.at(r)); };
        for (int64_t i = begin; i < end; ++i) finish_statistics(a, i, rows, moments, wide_o, height);
      });
  }
};

inline void conv3x3_nested(const Conv3x3& a) {
  Nesting(a).run();
}

#endif

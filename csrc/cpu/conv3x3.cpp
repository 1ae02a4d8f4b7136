// conv3x3 by Winograd's algorithm. Formula: fastdiff/ops/conv3x3.py; the algorithm's story: docs/conv3x3.md.
//
// A sample's image is cut into tiles of kOut x kOut results. For a slab of some rows of tiles: norm and SiLU of x into a
// padded image of a few channels, B^T d B of its tiles into kIn^2 matrices V [tiles, channels]; then for every block of
// output channels kIn^2 products V U, A^T m A of the results, bias, residual, scale, statistics. A result is one sum in
// the order of the channels, statistics are taken a row of tiles at a time: neither depends on batch, slabs or threads.
#ifndef FASTDIFF_ISA

#include "cpu/conv3x3.h"

#include <memory>
#define FASTDIFF_KERNELS "cpu/conv3x3.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void conv3x3(const Conv3x3& a, Winograd algorithm) {
  if (algorithm == Winograd::f6) return conv3x3_nested(a);
#define FASTDIFF_ARGUMENTS a, algorithm
  FASTDIFF_DISPATCH(conv3x3, FASTDIFF_ARGUMENTS);
}

char* kept_memory(int which, int64_t bytes) {
  thread_local std::unique_ptr<Scratch> kept[3];
  thread_local int64_t size[3] = {};
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

#include "cpu/conv3x3_transforms.h"

#include "cpu/conv3x3_product.h"

#include "cpu/conv3x3_image.h"

#include "cpu/conv3x3_tiles.h"

#include "cpu/conv3x3_results.h"

constexpr int64_t kWeights = 1 << 20;  // bytes that stay in a core's L2

template <class T, class Scheme_, class Op_> struct Winning : Results<T, Scheme_, Op_> {
  typedef Results<T, Scheme_, Op_> Base;
  using typename Base::Op, typename Base::Scheme, typename Base::Stored;
  using Base::Base, Base::kIn, Base::kOut, Base::kPoints, Base::a, Base::rows, Base::cols, Base::width, Base::words;
  using Base::wide_o, Base::plane, Base::v, Base::tables, Base::moments, Base::kChannels;

  // One point's m [tiles, block] += V [tiles, depth] u [depth, block] from word k on; fetches `size` floats from `ahead` on.
  void product(int p, int64_t tile, int64_t tiles, const float* u, int64_t block, int64_t k, int64_t depth, float* m,
               const float* ahead, int64_t size) const {
    const int64_t row = (Op::kScaled ? kShared : width) / Op::step, runs = parts(tiles, Op::kRows);
    const int64_t calls = runs * parts(block, Op::kVectors * W);
    const auto* from = reinterpret_cast<const float*>(this->place(p / kIn, tile, k * Op::step) + p % kIn * plane);
    const float* scale = Op::kScaled ? this->scales(k * Op::step, p / kIn, tile) : nullptr;
    int64_t call = 0;
    const int64_t want = parts(size, calls * depth), stride = least(want, kLine);
    for (int64_t o = 0; o < block; o += Op::kVectors * W) {
      const int vectors = static_cast<int>(least(Op::kVectors, (block - o) / W));
      for (int64_t i = 0; i < runs; ++i, ++call) {
        const int64_t t = i * tiles / runs, count = (i + 1) * tiles / runs - t;
        float* to = m + t * block + o;
        multiply_of<Op>(static_cast<int>(count), vectors)(from + t * row, row, u + o, block, depth, k ? to : nullptr, block, to,
                                                          block, scale + t, ahead + call * depth * stride, stride);
      }
    }
  }

  // The filters of output channels first_o ... , a multiple of kUnit, from word k on: [words, 9, kUnit].
  const float* taps_of(int64_t first_o, int64_t k) const {
    return static_cast<const float*>(a.packed) + 9 * (words * (first_o / kUnit * kUnit) + k * kUnit);
  }

  // m [kPoints, tiles, block] = V of `tiles` tiles from number `tile` on, times a block of weights.
  void products(int64_t tile, int64_t tiles, int64_t first_o, int64_t block, float* m, int64_t m_plane) const {
    const float* panel = static_cast<const float*>(a.packed) + kPoints * words * first_o;
    constexpr int64_t deep = Op::kScaled ? kShared / Op::step : kDepth;
    for (int p = 0; p < kPoints; ++p)
      for (int64_t k = 0; k < words; k += deep) {
        const int64_t depth = least(deep, words - k);
        product(p, tile, tiles, panel, block, k, depth, m + p * m_plane, panel + depth * block, depth * block);
        panel += depth * block;
      }
  }

  // Values at the points of `depth` filters from word k on, a block of output channels: u [kPoints, depth, block].
  void evaluate(int64_t first_o, int64_t block, int64_t k, int64_t depth, float* u, int64_t u_plane) const {
    for (int64_t o = 0; o < block; o += W) {
      const float* taps = taps_of(first_o + o, k) + o % kUnit;
      for (int64_t i = 0; i < depth; ++i, taps += 9 * kUnit) {
        vf down[3][kIn];
        each<3>([&](int j) __attribute__((always_inline)) {
          const auto tap = [&](int row) __attribute__((always_inline)) { return load(taps + (3 * row + j) * kUnit); };
          Scheme::filter(tap(0), tap(1), tap(2), down[j]);
        });
        each<kIn>([&](int p) __attribute__((always_inline)) {
          vf at[kIn];
          Scheme::filter(down[0][p], down[1][p], down[2][p], at);
          float* to = u + p * kIn * u_plane + i * block + o;
          each<kIn>([&](int q) __attribute__((always_inline)) { store(to + q * u_plane, at[q]); });
        });
      }
    }
  }

  // The same from a block of filters, some words at a time: their values stay in L2.
  void products_evaluated(int64_t tile, int64_t tiles, int64_t first_o, int64_t block, float* m, int64_t m_plane) const {
    const int64_t units = block / kUnit, u_plane = kSome * block + kLine;  // odd in cache lines
    float* u = m + kPoints * m_plane;
    for (int64_t k = 0, depth; k < words; k += depth) {
      depth = least(kSome, words - k);
      evaluate(first_o, block, k, depth, u, u_plane);
      for (int p = 0; p < kPoints; ++p) {  // each fetches its share of the filters that come next
        const int64_t share = 9 * kUnit * depth * units / kPoints;
        const float* ahead = taps_of(first_o + p % units * kUnit, k + depth) + p / units * share;
        product(p, tile, tiles, u + p * u_plane, block, k, depth, m + p * m_plane, ahead, share);
      }
    }
  }

  // The same of the first `tiles` tiles from a unit of filters, one group of tiles after the other.
  void products_of_filters(int64_t tiles, int64_t first_o, float* m, int64_t m_plane) const {
    const float* taps = taps_of(first_o, 0);
    const int64_t deep = parts(parts(words, parts(words, kDepth)), kLanes) * kLanes, groups = parts(tiles, Op::kGroup);
    for (int64_t k = 0, depth; k < words; k += depth, taps += 9 * kUnit * depth) {
      depth = least(deep, words - k);
      const float* ahead = taps + 9 * kUnit * depth;
      for (int64_t tile = 0; tile < tiles; tile += Op::kGroup) {
        const int count = static_cast<int>(least(Op::kGroup, tiles - tile)), at_once = Op::rows_at_once(count);
        const int64_t share = 9 * at_once * W / (kIn * groups);
        for (int p = 0; p < kIn; p += at_once)
          for (int64_t o = 0; o < kUnit; o += W, ahead += share * depth)
            multiply_filters_of<Scheme>(count, p)(this->place(p, tile, k), kIn * plane, taps + o, depth,
                                                  m + p * kIn * m_plane + tile * kUnit + o, m_plane, k > 0, ahead, share);
      }
    }
  }

  // Output channels first_o ... of the tile rows [begin, end) of the slab that starts at row `first`; of filters all rows.
  void out_of(int64_t first, int64_t begin, int64_t end, int64_t first_o) const {
    const int64_t block = least(Op::kBlock, wide_o - first_o), tiles = (end - begin) * cols, m_plane = tiles * block + 32;
    const int64_t values = Op::kEvaluates ? kPoints * (kSome * block + kLine) : 0;
    float* m = reinterpret_cast<float*>(kept_memory(1, (kPoints * m_plane + values) * 4));
    if constexpr (Op::kFilters) products_of_filters(tiles, first_o, m, m_plane);
    else if constexpr (Op::kEvaluates) products_evaluated(begin * cols, tiles, first_o, block, m, m_plane);
    else products(begin * cols, tiles, first_o, block, m, m_plane);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t o = 0; o < block; o += W)
        this->row_out((first + row) / rows, (first + row) % rows, first_o + o, m + (row - begin) * cols * block + o, m_plane,
                      block);
  }

  // Whether each thread takes slabs of its own, which saves it the others' V and two barriers for each slab: where there are
  // enough of them, and weights that every thread reads whole stay in its cache.
  bool apart(int64_t slabs) const {
    const int64_t bytes = (Op::kFilters || Op::kEvaluates ? 9 : kPoints) * words * wide_o * 4;
    const int64_t workers = threads(), idle = parts(slabs, workers) * workers - slabs;
    return workers > 1 && bytes <= kWeights && 4 * idle <= slabs;
  }

  void run() {
    const int64_t n = a.norm.n;
    const int64_t v_bytes = this->v_bytes();
    const int64_t table_bytes = n * ChannelTable<float>::bytes(a.norm.c);
    const int64_t moment_bytes = a.stats_groups ? n * rows * 2 * wide_o * 4 : 0;
    char* memory = kept_memory(0, v_bytes + table_bytes + moment_bytes);
    v = reinterpret_cast<Stored*>(memory);
    tables = reinterpret_cast<float*>(memory + v_bytes);
    moments = reinterpret_cast<float*>(memory + v_bytes + table_bytes);
    if (a.norm.weight) this->normalise(memory + v_bytes);
    const auto carry_out = [&](const Winning& w, int64_t i) {
      const auto [first, last] = w.slab(i);
      w.spread(last - first, parts(a.norm.c, kChannels), false,
               [&](int64_t begin, int64_t end, int64_t c) { w.into(first, begin, end, c * kChannels); });
      w.spread(last - first, parts(a.o, Op::kBlock), Op::kFilters,
               [&](int64_t begin, int64_t end, int64_t o) { w.out_of(first, begin, end, o * Op::kBlock); });
    };
    const int64_t slabs = this->slabs();
    if (apart(slabs)) {
      parallel_for(slabs, 1, [&](int64_t begin, int64_t end) {
        Winning own(*this);
        own.v = reinterpret_cast<Stored*>(kept_memory(2, v_bytes));
        for (int64_t i = begin; i < end; ++i) carry_out(own, i);
      });
    } else {
      for (int64_t i = 0; i < slabs; ++i) carry_out(*this, i);
    }
    if (a.stats_groups)
      parallel_for(n, grain_of(rows * a.o), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          finish_statistics(a, i, rows, moments, wide_o, [&](int64_t r) { return least(kOut, a.h - r * kOut); });
      });
  }
};

template <class T> void run_winograd(const Conv3x3& a, Winograd algorithm) {
  if constexpr (std::is_same_v<T, double>) return;
  else {
#if FASTDIFF_LEVEL >= 1
    if (algorithm == Winograd::f4_int16) return Winning<T, FourOf<true>, Shorts>(a).run();
#endif
#if FASTDIFF_LEVEL >= 3
    if (algorithm == Winograd::f2) return Winning<T, Two, Pairs>(a).run();
#endif
    if (algorithm == Winograd::f4) Winning<T, Four, Floats>(a).run();
    if (algorithm != Winograd::f4_lean) return;
    Winning<T, Four, Filters> few(a);
    if (few.slab_tiles() < kMany) few.run();
    else if constexpr (FASTDIFF_LEVEL < 2) Winning<T, Four, Evaluated>(a).run();
  }
}

inline void conv3x3(const Conv3x3& a, Winograd algorithm) {
  with_dtype(a.norm.x.dtype, [&](auto t) { run_winograd<decltype(t)>(a, algorithm); });
}

#endif

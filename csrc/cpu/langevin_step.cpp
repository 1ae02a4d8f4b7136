// langevin_step: sums of squares tile by tile, then the step. A sample that is one tile takes both from the cache, noise
// included. Formula: fastdiff/ops/langevin_step.py.
#ifndef FASTDIFF_ISA

#include <cmath>

#include "cpu/langevin_step.h"
#include "philox.h"
#define FASTDIFF_KERNELS "cpu/langevin_step.cpp"
#include "cpu/every_isa.h"

namespace fastdiff {
void langevin_step(const LangevinStep& a) { FASTDIFF_DISPATCH(langevin_step, a); }
}  // namespace fastdiff

#else

#include "cpu/noise.h"
#include "cpu/tile.h"

struct Squares { double z, score; };

// In float64 and in an order that size alone fixes: the same bits from every instruction set.
template <class B> double sum_of_squares(const B* v, int64_t size) {
  double lanes[16] = {}, total = 0;
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += static_cast<double>(v[i + j]) * static_cast<double>(v[i + j]);
  for (int j = 0; i < size; ++i, ++j) lanes[j] += static_cast<double>(v[i]) * static_cast<double>(v[i]);
  for (const double lane : lanes) total += lane;
  return total;
}

// One tile of one sample: what both passes need of it.
template <class A> struct Work {
  const LangevinStep& a;
  const Tiling& t;
  A *x_room, *score, *out;
  float* z;
  const A* x = nullptr;
  int64_t n = 0, first = 0, length = 0, size = 0;

  const A* row() const { return static_cast<const A*>(a.coefficients) + index() * langevin::kColumns; }
  int64_t index() const { return a.row[a.row_per_sample ? n : 0]; }

  void load(int64_t sample, int64_t tile) {
    n = sample, first = tile * t.length, length = t.length_of(tile), size = t.channels * length;
    x = read_tile(a.x, t, n, first, length, x_room);
    const A* f = read_tile(a.f, t, n, first, length, out);
    const A of_x = row()[langevin::kScoreX], of_f = row()[langevin::kScoreF];
    for (int64_t i = 0; i < size; ++i) score[i] = of_x * x[i] + of_f * f[i];
    noise_tile(stream_of(a.seeds[n], static_cast<uint32_t>(a.draws[index()]), kDomainStep), t, first, length, z, nullptr);
  }
  Squares squares() const { return {sum_of_squares(z, size), sum_of_squares(score, size)}; }

  // ratio: ||z||^2 / ||score||^2, or 1 where eps is given.
  void apply(double ratio) {
    const A eps = static_cast<A>(row()[langevin::kStep] * ratio), of_z = static_cast<A>(__builtin_sqrt(2.0 * eps));
    for (int64_t i = 0; i < size; ++i) score[i] = x[i] + eps * score[i];
    if (a.mean) write_tile(a.mean, t, n, first, length, static_cast<const A*>(score));
    for (int64_t i = 0; i < size; ++i) score[i] += of_z * z[i];
    write_tile(a.x, t, n, first, length, static_cast<const A*>(score));
    const A next_in = row()[langevin::kNextIn];
    for (int64_t i = 0; i < size; ++i) out[i] = next_in * score[i];
    write_tile(a.net_in, t, n, first, length, static_cast<const A*>(out));
  }
};

FD_INLINE double ratio_of(double z, double score) { return score == 0 ? 0 : z / score; }

// Per sample, or the same for all, from the sums of its tiles.
inline void ratios(const LangevinStep& a, int64_t tiles, const Squares* parts, double* ratio) {
  double mean_z = 0, mean_score = 0;
  for (int64_t n = 0; n < a.n; ++n) {
    Squares total{0, 0};
    for (int64_t i = 0; i < tiles; ++i) total.z += parts[n * tiles + i].z, total.score += parts[n * tiles + i].score;
    ratio[n] = ratio_of(total.z, total.score);
    mean_z += __builtin_sqrt(total.z), mean_score += __builtin_sqrt(total.score);
  }
  const double common = ratio_of(mean_z, mean_score);
  for (int64_t n = 0; a.norms == langevin::kBatch && n < a.n; ++n) ratio[n] = common * common;
}

template <class A> void langevin_all(LangevinStep a) {
  const bool run = is_flat(a.x, a.c, a.s) && is_flat(a.f, a.c, a.s) && is_flat(a.net_in, a.c, a.s) &&
                   (!a.mean || is_flat(a.mean, a.c, a.s));
  if (run) a.x = as_run(a.x), a.f = as_run(a.f), a.net_in = as_run(a.net_in), a.mean = as_run(a.mean);
  const Tiling tiling(a.c, a.s, run ? Walk::run : Walk::tiles);
  const int64_t room = tiling.channels * tiling.length, tasks = a.n * tiling.count;
  const auto each_tile = [&](auto&& body) {
    parallel_for(tasks, 4, [&](int64_t begin, int64_t end) {
      const Scratch memory(room * (3 * sizeof(A) + sizeof(float)));
      A* m = reinterpret_cast<A*>(memory.data);
      Work<A> work{a, tiling, m, m + room, m + 2 * room, reinterpret_cast<float*>(m + 3 * room)};
      for (int64_t task = begin; task < end; ++task) {
        work.load(task / tiling.count, task % tiling.count);
        body(work, task);
      }
    });
  };
  if (a.norms == langevin::kGiven) return each_tile([](Work<A>& work, int64_t) { work.apply(1); });
  if (tiling.count == 1 && a.norms == langevin::kSample)
    return each_tile([](Work<A>& work, int64_t) {
      const Squares s = work.squares();
      work.apply(ratio_of(s.z, s.score));
    });
  const Scratch memory(tasks * sizeof(Squares) + a.n * sizeof(double));
  Squares* parts = reinterpret_cast<Squares*>(memory.data);
  double* ratio = reinterpret_cast<double*>(parts + tasks);
  each_tile([&](Work<A>& work, int64_t task) { parts[task] = work.squares(); });
  ratios(a, tiling.count, parts, ratio);
  each_tile([&](Work<A>& work, int64_t task) { work.apply(ratio[task / tiling.count]); });
}

inline void langevin_step(const LangevinStep& a) {
  a.x.dtype == Dtype::f64 ? langevin_all<double>(a) : langevin_all<float>(a);
}

#endif

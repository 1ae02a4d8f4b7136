// Statistics, per-channel coefficients and the division of work that the ops with a group norm share. Include inside a
// kernel file. Nothing here depends on the number of threads or on the batch: pieces are cut by a sample's shape alone.

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

// The map of channels c0 ... c0 + count - 1 of sample n from their means and 1 / standard deviations; a and b times `unit`.
template <class A>
void channel_maps(const GroupNormSilu& g, int64_t n, int64_t c0, int64_t count, const double* mean, const double* rstd,
                  const ChannelTable<A>& table, double unit = 1) {
  constexpr int64_t step = W / 2;
  const A *weight = static_cast<const A*>(g.weight) + c0, *bias = static_cast<const A*>(g.bias) + c0;
  const auto row = [&](const void* p) { return p ? static_cast<const A*>(p) + n * g.c + c0 : nullptr; };
  const A *add = row(g.add), *scale = row(g.scale), *shift = row(g.shift);
  int64_t c = 0;
  for (; c + step <= count; c += step) {
    const vd gain = scale ? unit * (1 + wide(scale + c)) : splat<vd>(unit), slope = wide(rstd + c) * wide(weight + c);
    const vd center = add ? wide(mean + c) - wide(add + c) : wide(mean + c);
    narrow(table.m + c, center);
    narrow(table.a + c, slope * gain);
    const vd b = (wide(bias + c) - (center - wide(table.m + c)) * slope) * gain;
    narrow(table.b + c, shift ? b + unit * wide(shift + c) : b);
  }
  for (; c < count; ++c) {
    const double gain = unit * (1 + or_zero(scale, c)), slope = rstd[c] * weight[c], center = mean[c] - or_zero(add, c);
    table.m[c] = static_cast<A>(center), table.a[c] = static_cast<A>(slope * gain);
    table.b[c] = static_cast<A>((bias[c] - (center - table.m[c]) * slope) * gain + unit * or_zero(shift, c));
  }
}

// The same from known statistics of groups, for all channels; memory for 2 c doubles.
template <class A>
void channel_maps(const GroupNormSilu& g, int64_t n, double* memory, const ChannelTable<A>& table, double unit = 1) {
  const int64_t per = g.c / g.groups;
  double *mean = memory, *rstd = memory + g.c;
  for (int64_t group = 0; group < g.groups; ++group) {
    const A* stats = stats_of<A>(g, n, group);
    const double r = rstd_of(g, stats[1]);
    for (int64_t c = group * per; c < (group + 1) * per; ++c) mean[c] = stats[0], rstd[c] = r;
  }
  channel_maps(g, n, 0, g.c, mean, rstd, table, unit);
}

#include "cpu/group_norm_moments.h"

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

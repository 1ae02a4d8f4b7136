// group_norm_silu on CUDA for channels-last tensors, each element of x read from device memory once. Plain C++: the plan and
// the kernel's phases (group_norm_silu_block.h) also compile without nvcc, for a test that runs them on the host.
#pragma once
#include "cpu/common.h"

namespace fastdiff {

struct Parameter {
  const void* data = nullptr;  // null where absent
  Dtype dtype = Dtype::f32;
};

struct GroupNormSiluCuda {
  const void* x;  // [n, s, c]: pixels x_s elements apart, samples x_n; 16-byte aligned like y
  void* y;
  int64_t n, c, s, groups, x_n, x_s, y_n, y_s;
  Dtype dtype;
  float eps;
  bool silu, given;                        // given: stats are read, else written
  Parameter weight, bias;                  // [c]
  Parameter add, scale, shift;             // [n, c]
  float* stats;                            // [n, groups, 2]
};

// How the work is cut. A slice, one sample's pixels of `width` neighbouring channels (whole groups, 16-byte vectors),
// belongs to a cluster of `ranks` blocks of kThreads threads; each keeps `rows` of its pixels in shared memory.
struct NormPlan {
  int width = 0;  // 0: no plan, the slice does not fit
  int slices = 0;  // of a sample; the last one may be narrower
  int per = 0;     // channels of a group
  int ranks = 1;
  int rows = 0;   // pixels of a rank; the last one may have fewer, or none
  int slots = 0;  // 16-byte vectors a thread holds
  int shared = 0;  // bytes a block
};

constexpr int kThreads = 256;

inline int64_t gcd_of(int64_t a, int64_t b) { return b == 0 ? a : gcd_of(b, a % b); }

// Bytes of shared memory: slots, the reduction's two rows, three coefficients a channel, six numbers a group, partial sums.
inline int64_t shared_of(int64_t slots, int64_t width, int64_t per, int64_t vector) {
  return slots * kThreads * 16 + 2 * kThreads * vector * 4 + 3 * width * 4 + 6 * (width / per) * 4 + 2 * kThreads * 4;
}

// `most_shared`: bytes a block may have; `most_ranks`: 8 where there are clusters, else 1.
inline NormPlan plan_norm(const GroupNormSiluCuda& a, int multiprocessors, int most_shared, int most_ranks) {
  const int64_t size = a.dtype == Dtype::f32 ? 4 : 2, vector = 16 / size, per = a.c / a.groups;
  const int64_t unit = per / gcd_of(per, vector) * vector;
  NormPlan p;
  if (a.dtype == Dtype::f64 || a.c % vector || a.n * a.c * a.s == 0 || a.s >= int64_t{1} << 30) return p;
  const auto width_for = [&](int64_t bytes) {
    const int64_t wide = (bytes / size + unit - 1) / unit * unit;
    return wide < a.c ? wide : a.c;
  };
  int64_t width = width_for(128);  // narrower, down to a memory sector, where there would be too few blocks
  if (a.n * (a.c / width) < 4 * multiprocessors) width = width_for(64);
  if (a.n * (a.c / width) * 8 < multiprocessors) width = width_for(32);
  if (width / vector > kThreads || width / per > kThreads) return p;
  const int64_t slices = (a.c + width - 1) / width, across = kThreads / (width / vector);
  if (a.n * slices * 8 > 2147483647) return p;
  const auto cut = [&](int64_t ranks) {
    const int64_t rows = (a.s + ranks - 1) / ranks, slots = (rows + across - 1) / across;
    const int64_t shared = shared_of(a.given ? 0 : slots, width, per, vector);
    if (shared > most_shared) return false;
    p = {int(width), int(slices), int(per), int(ranks), int(rows), int(slots), int(shared)};
    return true;
  };
  if (a.given) {  // nothing to share: as many blocks as give each thread eight vectors
    const int64_t ranks = (a.s + across * 8 - 1) / (across * 8);
    return cut(a.n * slices * ranks > 2147483647 ? 1 : ranks), p;
  }
  // More ranks until three blocks fit a multiprocessor and all multiprocessors have two, or a thread would hold one vector.
  for (int64_t ranks = 1; ranks <= most_ranks; ranks *= 2) {
    if (p.width && p.shared <= 72 * 1024 && (a.n * slices * p.ranks >= 2 * multiprocessors || p.slots <= 2)) break;
    cut(ranks);
  }
  return p;
}

// The plan on the current device, width 0 where the kernel does not serve this case.
NormPlan plan_norm_here(const GroupNormSiluCuda& a);
// Queues the kernel on `stream`; returns an error's text, or null. The tensors' device must be current.
const char* group_norm_silu_cuda(const GroupNormSiluCuda& a, const NormPlan& p, void* stream);

}  // namespace fastdiff

// Runs the phases of csrc/cuda/group_norm_silu_block.h on the host: every thread of every block of a cluster, phase by phase,
// in the order of the barriers of csrc/cuda/group_norm_silu.cu. Built and called by test_group_norm_cuda.py.
#include <vector>

#include "cuda/group_norm_silu_block.h"

namespace fastdiff {
namespace {

template <class T, bool given> void cluster(const GroupNormSiluCuda& a, const NormPlan& p, int64_t slice) {
  std::vector<std::vector<uint4>> memory(p.ranks);  // poisoned with NaN
  std::vector<NormBlock<T>> blocks;
  for (int r = 0; r < p.ranks; ++r) {
    memory[r].assign(p.shared / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
    blocks.emplace_back(a, p, slice * p.ranks + r, reinterpret_cast<char*>(memory[r].data()));
  }
  const auto phase = [&](auto f) {
    for (const auto& block : blocks)
      for (int t = 0; t < kThreads; ++t) f(block, t);
  };
  phase([&](const auto& b, int t) { b.template fetch<given>(a, t); });
  if (!given) {
    phase([&](const auto& b, int t) { b.sum(t); });
    phase([&](const auto& b, int t) { b.fold(0, t); });
    phase([&](const auto& b, int t) { b.block_mean(t); });
    phase([&](const auto& b, int t) { b.deviations(t); });
    phase([&](const auto& b, int t) {
      b.fold(0, t);
      if (b.kPrecise) b.fold(1, t);
    });
    phase([&](const auto& b, int t) { b.block_moments(t); });
  }
  phase([&](const auto& b, int t) { b.template merge<given>(a, p, t, [&](int r) { return static_cast<const float*>(blocks[r].part); }); });
  phase([&](const auto& b, int t) { b.coefficients(t); });
  if (a.silu) phase([&](const auto& b, int t) { b.template apply<true, given>(a, t); });
  else phase([&](const auto& b, int t) { b.template apply<false, given>(a, t); });
  for (int r = 0; r < p.ranks; ++r)  // the block's memory was enough
    if (memory[r].back().w != ~0u || memory[r].back().x != ~0u) throw 1;
}

}  // namespace
}  // namespace fastdiff

// The plan's numbers, for n, c, s and groups.
extern "C" void plan_on_host(const int64_t* sizes, int dtype, const int* device, int* plan) {
  using namespace fastdiff;
  GroupNormSiluCuda a{};
  a.n = sizes[0], a.c = sizes[1], a.s = sizes[2], a.groups = sizes[3], a.dtype = static_cast<Dtype>(dtype);
  const NormPlan p = plan_norm(a, device[0], device[1], device[2]);
  const int numbers[] = {p.width, p.slices, p.per, p.ranks, p.rows, p.slots, p.shared};
  for (int i = 0; i < 7; ++i) plan[i] = numbers[i];
}

// The plan's numbers to `plan`; nothing else where its width is 0. 1: a block wrote past its shared memory.
extern "C" int group_norm_on_host(const void* x, void* y, const int64_t* sizes, int dtype, float eps, int silu, int given,
                                  const void* const* parameters, const int* types, float* stats, const int* device, int* plan) {
  using namespace fastdiff;
  GroupNormSiluCuda a{};
  a.x = x, a.y = y, a.n = sizes[0], a.c = sizes[1], a.s = sizes[2], a.groups = sizes[3];
  a.x_n = sizes[4], a.x_s = sizes[5], a.y_n = sizes[6], a.y_s = sizes[7];
  a.dtype = static_cast<Dtype>(dtype), a.eps = eps, a.silu = silu, a.given = given, a.stats = stats;
  Parameter* const of[] = {&a.weight, &a.bias, &a.add, &a.scale, &a.shift};
  for (int i = 0; i < 5; ++i) *of[i] = {parameters[i], static_cast<Dtype>(types[i])};
  plan_on_host(sizes, dtype, device, plan);
  const NormPlan p = plan_norm(a, device[0], device[1], device[2]);
  if (p.width == 0) return 0;
  try {
    for (int64_t slice = 0; slice < a.n * p.slices; ++slice) {
      const auto run = [&](auto t) { a.given ? cluster<decltype(t), true>(a, p, slice) : cluster<decltype(t), false>(a, p, slice); };
      if (a.dtype == Dtype::f32) run(float{});
      else if (a.dtype == Dtype::bf16) run(bfloat16{});
      else run(float16{});
    }
  } catch (int) {
    return 1;
  }
  return 0;
}

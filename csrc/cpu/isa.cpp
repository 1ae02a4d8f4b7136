// The instruction set in use: the best that this machine runs, chosen when the extension is loaded.
#include <new>

#include "cpu/common.h"

namespace fastdiff {

int best_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 3 : 2;
#else
  return 0;
#endif
}

Scratch::Scratch(int64_t bytes) : data(static_cast<char*>(::operator new(bytes, std::align_val_t{64}))) {}
Scratch::~Scratch() { ::operator delete(data, std::align_val_t{64}); }

std::atomic<int> isa{best_isa()};

}  // namespace fastdiff

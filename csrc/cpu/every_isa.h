// Includes the kernel file FASTDIFF_KERNELS once per instruction set, each time in a namespace and target of its own
// (the scheme of Highway's foreach_target.h). Standard headers come first, under the baseline target: an inline function
// of theirs compiled for AVX-512 could be the copy that the linker keeps for everyone.
#include "cpu/common.h"

#define FASTDIFF_ISA baseline
#define FASTDIFF_LEVEL 0
namespace fastdiff::baseline {
#include "cpu/simd.h"
#include FASTDIFF_KERNELS
}
#undef FASTDIFF_ISA
#undef FASTDIFF_LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define FASTDIFF_ISA avx2
#define FASTDIFF_LEVEL 1
namespace fastdiff::avx2 {
#include "cpu/simd.h"
#include FASTDIFF_KERNELS
}
#undef FASTDIFF_ISA
#undef FASTDIFF_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FASTDIFF_ISA avx512
#define FASTDIFF_LEVEL 2
namespace fastdiff::avx512 {
#include "cpu/simd.h"
#include FASTDIFF_KERNELS
}
#undef FASTDIFF_ISA
#undef FASTDIFF_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,prefer-vector-width=512")
#define FASTDIFF_ISA avx512_bf16
#define FASTDIFF_LEVEL 3
namespace fastdiff::avx512_bf16 {
#include "cpu/simd.h"
#include FASTDIFF_KERNELS
}
#undef FASTDIFF_ISA
#undef FASTDIFF_LEVEL
#pragma GCC pop_options

#define FASTDIFF_DISPATCH(kernel, arguments)                              \
  switch (isa.load(std::memory_order_relaxed)) {                          \
    case 3: return avx512_bf16::kernel(arguments);                        \
    case 2: return avx512::kernel(arguments);                             \
    case 1: return avx2::kernel(arguments);                               \
    default: return baseline::kernel(arguments);                          \
  }

#else
#define FASTDIFF_DISPATCH(kernel, arguments) return baseline::kernel(arguments)
#endif

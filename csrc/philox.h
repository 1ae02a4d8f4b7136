// Philox4x32-10 and Box-Muller: the constants, and the scalar form that CUDA uses. docs/noise.md fixes every rounding;
// csrc/cpu/noise.h is the same formula on vectors, fastdiff/ops/philox_normal.py the reference.
#pragma once

#include <cstdint>

namespace fastdiff {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Counter word 3, as fastdiff.ops.Domain.
constexpr uint32_t kDomainStep = 1;

constexpr int32_t kSqrtHalfBits = 0x3F3504F3;
constexpr float kLn2Times2 = 1.3862943649291992f;
constexpr float kTwoToMinus32 = 2.3283064365386963e-10f, kTwoToMinus33 = 1.1641532182693481e-10f;

// Highest power first. -2 ln(1+f) = f L(f); sin(pi/2 q) = q S(q^2), cos(pi/2 q) = C(q^2). Macros: every back end pastes
// the numbers into its own constants (device code cannot read host arrays).
#define FASTDIFF_LOG_POLY \
  {0.15719091892242432f, -0.25763243436813354f, 0.2625753581523895f, -0.28362393379211426f, 0.33249107003211975f, \
   -0.4000457227230072f, 0.5000162124633789f, -0.6666663289070129f, 1.0f, -2.0f}
#define FASTDIFF_SIN_POLY {-0.004602177068591118f, 0.07968022674322128f, -0.6459634900093079f, 1.5707963705062866f}
#define FASTDIFF_COS_POLY \
  {0.0009067435166798532f, -0.02086152881383896f, 0.253669410943985f, -1.2337005138397217f, 1.0f}

}  // namespace fastdiff

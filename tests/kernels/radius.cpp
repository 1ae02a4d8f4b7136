// For every first word: the squared radius of docs/noise.md must not be less than zero. Prints how many are, the number of -0
// and the largest, as bits.
#include <cstdio>
#include <cstring>

#include "philox.h"

using namespace fastdiff;

int main() {
  constexpr float log_poly[] = FASTDIFF_LOG_POLY;
  uint64_t negative = 0, zeros = 0;
  float largest = 0;
  for (uint64_t start = 0; start < (1ull << 32); start += 1 << 16) {
    uint32_t less = 0, zero = 0;
    float most = 0;
    for (uint32_t i = 0; i < 1 << 16; ++i) {
      const float u = static_cast<float>(static_cast<uint32_t>(start) + i) * kTwoToMinus32 + kTwoToMinus33;
      int32_t shifted;
      std::memcpy(&shifted, &u, 4);
      shifted -= kSqrtHalfBits;
      const int32_t mantissa = (shifted & 0x7FFFFF) + kSqrtHalfBits;
      float f;
      std::memcpy(&f, &mantissa, 4);
      f -= 1.0f;
      float p = log_poly[0];
      for (int k = 1; k < 10; ++k) p = p * f + log_poly[k];
      const float squared = static_cast<float>(shifted >> 23) * -kLn2Times2 + f * p;
      less += !(squared >= 0.0f), zero += squared == 0.0f;
      most = squared > most ? squared : most;
    }
    negative += less, zeros += zero;
    largest = most > largest ? most : largest;
  }
  uint32_t bits;
  std::memcpy(&bits, &largest, 4);
  std::printf("%llu %llu %08x\n", static_cast<unsigned long long>(negative), static_cast<unsigned long long>(zeros), bits);
}

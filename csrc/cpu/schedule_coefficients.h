#pragma once
#include "cpu/common.h"

namespace fastdiff {

// Codes and columns, as the enums Law, Target and Column of fastdiff/ops/schedule_coefficients.py.
enum class Law : int64_t { ve, vp, sub_vp, table, flow, trig, log_snr, count };
enum class Target : int64_t { eps, x0, v, score, flow, edm, count };
enum : int { kAlpha, kSigma, kLogSnr, kSkip, kOut, kIn, kNoise, kCoefficients };

struct ScheduleCoefficients {
  const double* t;      // [n]
  const double* table;  // [length], length >= 2, for Law::table
  int64_t n, length;
  Law law;
  Target target;
  double p0, p1, sigma_data, shift, time_scale;
  bool raw, slopes;
  void* out;  // [n, kCoefficients], float or double
  Dtype dtype;
};
void schedule_coefficients(const ScheduleCoefficients& a);

}  // namespace fastdiff

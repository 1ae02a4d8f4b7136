// schedule_coefficients: a few transcendental functions a sample, all in float64 and libm's, so that one build serves every
// instruction set with the same bits. Formulas: fastdiff/ops/schedule_coefficients.py.
#include "cpu/schedule_coefficients.h"

#include <cmath>

namespace fastdiff {
namespace {

struct Path { double a, s, da, ds; };  // alpha, sigma and their derivatives by t

Path variance_preserving(double log, double slope, bool sub) {  // of log alpha^2 and its slope
  const double a = std::exp(log / 2), v = -std::expm1(log), dv = -std::exp(log) * slope, s = sub ? v : std::sqrt(v);
  return {a, s, a * slope / 2, sub ? dv : dv / (2 * s)};
}

Path path_at(const ScheduleCoefficients& c, double t) {
  switch (c.law) {
    case Law::ve: return {1, t, 0, 1};
    case Law::flow: return {1 - t, t, -1, 1};
    case Law::trig: return {std::cos(t), c.p0 * std::sin(t), -std::sin(t), c.p0 * std::cos(t)};
    case Law::log_snr: {
      const double a = std::sqrt(1 / (1 + std::exp(-t))), s = std::sqrt(1 / (1 + std::exp(t)));
      return {a, s, a * s * s / 2, -s * a * a / 2};
    }
    case Law::table: {
      const double last = static_cast<double>(c.length - 1), inside = t < 0 ? 0 : t > last ? last : t;  // NaN stays
      int64_t i = inside > 0 ? static_cast<int64_t>(inside) : 0;
      if (i > c.length - 2) i = c.length - 2;
      const double slope = c.table[i + 1] - c.table[i];
      return variance_preserving(c.table[i] + (inside - i) * slope, t >= 0 && t <= last ? slope : 0, false);
    }
    default: {
      const double d = c.p1 - c.p0;
      return variance_preserving(-0.5 * t * t * d - t * c.p0, -t * d - c.p0, c.law == Law::sub_vp);
    }
  }
}

void edm(const ScheduleCoefficients& c, const Path& p, double r, double dr, double* out) {
  const double sd = c.sigma_data, w = r - c.shift, m = w * w + sd * sd, h2 = r * r + sd * sd, h = std::sqrt(h2);
  out[kSkip] = sd * sd / m / p.a, out[kOut] = sd * w / h, out[kIn] = 1 / (p.a * h),
      out[kNoise] = c.time_scale * std::log(r) / 4;
  if (!c.slopes) return;
  out[kSkip] *= -2 * w * dr / m - p.da / p.a;
  out[kOut] = sd * dr * (sd * sd + c.shift * r) / (h2 * h);
  out[kIn] *= -(p.da / p.a + r * dr / h2);
  out[kNoise] = c.time_scale * dr / (4 * r);
}

// c_skip and c_out, or their derivatives, of the targets whose c_in is 1.
void plain(const ScheduleCoefficients& c, const Path& p, double t, double r, double dr, double* out) {
  const double q = p.a * p.a + p.s * p.s, dq = 2 * (p.a * p.da + p.s * p.ds);
  double &skip = out[kSkip], &of_f = out[kOut];
  if (c.slopes) {
    skip = -p.da / (p.a * p.a), of_f = -dr;
    if (c.target == Target::x0) skip = of_f = 0;
    if (c.target == Target::v) skip = (p.da - p.a * dq / q) / q, of_f = (p.s * dq / q - p.ds) / q;
    if (c.target == Target::score) of_f = p.ds * r + p.s * dr;
    if (c.target == Target::flow) skip = 0, of_f = -1;
    if (c.target == Target::ve) of_f = dr;
  } else {
    skip = 1 / p.a, of_f = -r;
    if (c.target == Target::x0) skip = 0, of_f = 1;
    if (c.target == Target::v) skip = p.a / q, of_f = -p.s / q;
    if (c.target == Target::score) of_f = p.s * r;
    if (c.target == Target::flow) skip = 1, of_f = -t;
    if (c.target == Target::ve) of_f = r;
  }
  out[kIn] = c.slopes ? 0 : 1, out[kNoise] = c.time_scale * (c.slopes ? 1 : t);
  if (c.target == Target::ve) out[kNoise] = c.slopes ? p.ds / p.s : std::log(c.time_scale * p.s);
}

void columns_at(const ScheduleCoefficients& c, double t, double* out) {
  const Path p = path_at(c, t);
  const double r = p.s / p.a, dr = (p.ds - r * p.da) / p.a;
  out[kAlpha] = c.slopes ? p.da : p.a, out[kSigma] = c.slopes ? p.ds : p.s;
  out[kLogSnr] = c.slopes ? 2 * (p.da / p.a - p.ds / p.s) : -2 * std::log(r);
  if (c.law == Law::log_snr) out[kLogSnr] = c.slopes ? 1 : t;
  c.target == Target::edm ? edm(c, p, r, dr, out) : plain(c, p, t, r, dr, out);
  if (c.raw) out[kIn] = c.slopes ? 0 : 1, out[kNoise] = c.slopes ? 1 : t;
}

}  // namespace

void schedule_coefficients(const ScheduleCoefficients& c) {
  parallel_for(c.n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double columns[kCoefficients];
      columns_at(c, c.t[i], columns);
      for (int j = 0; j < kCoefficients; ++j) {
        if (c.dtype == Dtype::f64) static_cast<double*>(c.out)[i * kCoefficients + j] = columns[j];
        else static_cast<float*>(c.out)[i * kCoefficients + j] = static_cast<float>(columns[j]);
      }
    }
  });
}

}  // namespace fastdiff

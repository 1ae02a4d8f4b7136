"""schedule_coefficients in Triton: float64 formulas, one time a lane. Law, target and slopes are compiled in."""

import torch
import triton
import triton.language as tl

from fastdiff.kernels.dependent import begin, dependent
from fastdiff.ops.schedule_coefficients import Column, Law, Target

VE, VP, SUB_VP, TABLE = (tl.constexpr(int(v)) for v in (Law.VE, Law.VP, Law.SUB_VP, Law.TABLE))
FLOW_LAW, TRIG, LOG_SNR = (tl.constexpr(int(v)) for v in (Law.FLOW, Law.TRIG, Law.LOG_SNR))
X0, V, SCORE = (tl.constexpr(int(v)) for v in (Target.X0, Target.V, Target.SCORE))
FLOW, EDM, SIGMA_SCORE = (tl.constexpr(int(v)) for v in (Target.FLOW, Target.EDM, Target.VE))
COLUMNS = tl.constexpr(len(Column))
BLOCK = 64  # times per program


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, to a few units in the last place: the errors of u - 1 and of log u cancel (Kahan)."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, (u - 1.0) * x / tl.where(u == 1.0, 1.0, tl.log(u))))


@triton.jit
def _sine_cosine(t):
    """sin t, cos t in float64 for |t| <= 2^20: Taylor's polynomials within an eighth of a turn."""
    k = tl.floor(t * 0.6366197723675814 + 0.5)
    x = (t - k * 1.5707963267341256) - k * 6.077100506506192e-11  # pi / 2 in two parts, k times the first exact
    y = x * x
    s = y * -8.22063524662433e-18 + 2.8114572543455206e-15
    s = s * y + -7.647163731819816e-13
    s = s * y + 1.6059043836821613e-10
    s = s * y + -2.505210838544172e-08
    s = s * y + 2.7557319223985893e-06
    s = s * y + -0.0001984126984126984
    s = s * y + 0.008333333333333333
    s = s * y + -0.16666666666666666
    s = x + x * y * s
    c = y * -1.5619206968586225e-16 + 4.779477332387385e-14
    c = c * y + -1.1470745597729725e-11
    c = c * y + 2.08767569878681e-09
    c = c * y + -2.755731922398589e-07
    c = c * y + 2.48015873015873e-05
    c = c * y + -0.001388888888888889
    c = c * y + 0.041666666666666664
    c = 1.0 - 0.5 * y + y * y * c
    turn = k - 4.0 * tl.floor(k * 0.25)
    odd = (turn == 1.0) | (turn == 3.0)
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(turn >= 2.0, -sine, sine), tl.where((turn == 1.0) | (turn == 2.0), -cosine, cosine)


@triton.jit
def _path(t, table, last, known, LAW: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """alpha, sigma and their derivatives by t."""
    a = tl.full(t.shape, 1.0, tl.float64)
    s = t
    da = a * 0.0
    ds = a
    if LAW == FLOW_LAW:
        a = 1.0 - t
        da = -ds
    elif LAW == TRIG:
        sine, cosine = _sine_cosine(t)
        a, s, da, ds = cosine, P0 * sine, -sine, P0 * cosine
    elif LAW == LOG_SNR:
        a, s = tl.sqrt(1.0 / (1.0 + tl.exp(-t))), tl.sqrt(1.0 / (1.0 + tl.exp(t)))
        da, ds = a * s * s * 0.5, -s * a * a * 0.5
    elif LAW != VE:
        if LAW == TABLE:
            inside = tl.where(t < 0.0, 0.0, tl.where(t > last, last + t * 0.0, t))  # NaN stays
            i = tl.minimum(tl.where(inside > 0.0, inside, 0.0).to(tl.int32), last - 1)
            low = tl.load(table + i, mask=known, other=0.0)
            slope = tl.load(table + i + 1, mask=known, other=0.0) - low
            log = low + (inside - i.to(tl.float64)) * slope
            slope = tl.where((t >= 0.0) & (t <= last), slope, 0.0)
        else:
            log = -0.5 * t * t * (P1 - P0) - t * P0
            slope = -t * (P1 - P0) - P0
        a, s = tl.exp(log * 0.5), -_expm1(log)
        da, ds = a * slope * 0.5, -tl.exp(log) * slope
        if LAW != SUB_VP:
            s = tl.sqrt(s)
            ds = ds / (2.0 * s)
    return a, s, da, ds


@triton.jit
def _schedule_coefficients(
    t,  # [N]
    table,  # float64 [last + 1]
    out,  # [N, COLUMNS]
    size,  # N
    last,
    LAW: tl.constexpr,
    TARGET: tl.constexpr,
    P0: tl.constexpr,  # numbers are compiled in: an ordinary float argument would be float32
    P1: tl.constexpr,
    SIGMA_DATA: tl.constexpr,
    SHIFT: tl.constexpr,
    TIME_SCALE: tl.constexpr,
    RAW: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = i < size
    now = tl.load(t + i, mask=known, other=0.5).to(tl.float64)
    a, s, da, ds = _path(now, table, last, known, LAW, P0, P1)
    r = s / a
    dr = (ds - r * da) / a
    one = tl.full(now.shape, 1.0, tl.float64)
    if SLOPES:
        alpha, sigma, log_snr, c_in, c_noise = da, ds, 2.0 * (da / a - ds / s), one * 0.0, one * TIME_SCALE
    else:
        alpha, sigma, log_snr, c_in, c_noise = a, s, -2.0 * tl.log(r), one, now * TIME_SCALE
    if LAW == LOG_SNR:
        log_snr = one if SLOPES else now
    if TARGET == EDM:
        w = r - SHIFT
        m, h2 = w * w + SIGMA_DATA * SIGMA_DATA, r * r + SIGMA_DATA * SIGMA_DATA
        h = tl.sqrt(h2)
        skip, of_f, c_in, c_noise = (
            SIGMA_DATA * SIGMA_DATA / m / a,
            SIGMA_DATA * w / h,
            1.0 / (a * h),
            tl.log(r) * (TIME_SCALE * 0.25),
        )
        if SLOPES:
            skip *= -2.0 * w * dr / m - da / a
            of_f = SIGMA_DATA * dr * (SIGMA_DATA * SIGMA_DATA + SHIFT * r) / (h2 * h)
            c_in *= -(da / a + r * dr / h2)
            c_noise = TIME_SCALE * dr / (4.0 * r)
    elif TARGET == X0:
        skip = one * 0.0
        of_f = one * 0.0 if SLOPES else one
    elif TARGET == V:
        q, dq = a * a + s * s, 2.0 * (a * da + s * ds)
        skip = (da - a * dq / q) / q if SLOPES else a / q
        of_f = (s * dq / q - ds) / q if SLOPES else -s / q
    elif TARGET == FLOW:
        skip = one * 0.0 if SLOPES else one
        of_f = -one if SLOPES else -now
    elif TARGET == SCORE:
        skip = -da / (a * a) if SLOPES else 1.0 / a
        of_f = ds * r + s * dr if SLOPES else s * r
    elif TARGET == SIGMA_SCORE:
        skip = -da / (a * a) if SLOPES else 1.0 / a
        of_f = dr if SLOPES else r
        c_noise = ds / s if SLOPES else tl.log(TIME_SCALE * s)
    else:
        skip = -da / (a * a) if SLOPES else 1.0 / a
        of_f = -dr if SLOPES else -r
    if RAW:
        c_in = one * 0.0 if SLOPES else one
        c_noise = one if SLOPES else now
    to = out + i * COLUMNS
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(to, alpha.to(dtype), mask=known)
    tl.store(to + 1, sigma.to(dtype), mask=known)
    tl.store(to + 2, log_snr.to(dtype), mask=known)
    tl.store(to + 3, skip.to(dtype), mask=known)
    tl.store(to + 4, of_f.to(dtype), mask=known)
    tl.store(to + 5, c_in.to(dtype), mask=known)
    tl.store(to + 6, c_noise.to(dtype), mask=known)


def schedule_coefficients(t, table, law, target, p0, p1, sigma_data, shift, time_scale, raw, slopes, dtype):
    """[..., 7]; bytes moved: t read, seven numbers a time written."""
    out = t.new_empty((*t.shape, len(Column)), dtype=dtype)
    if out.numel() == 0:
        return out
    last = 1 if table is None else table.shape[0] - 1
    with torch.cuda.device_of(t):
        _schedule_coefficients[(triton.cdiv(t.numel(), BLOCK),)](
            t.contiguous(), t if table is None else table.contiguous(), out, t.numel(), last,
            law, target, p0, p1, sigma_data, shift, time_scale, raw, slopes, BLOCK, num_warps=2,
            enable_fp_fusion=True, **dependent(t),
        )  # fmt: skip
    return out

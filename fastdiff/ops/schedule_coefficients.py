"""schedule_coefficients: everything that a time determines, for a batch of times on the device.

With alpha and sigma of the path x_t = alpha x0 + sigma n (`Law`) and D = c_skip x + c_out F(c_in x, c_noise) (`Target`):

    out[..., :] = alpha, sigma, log(alpha^2 / sigma^2), c_skip, c_out, c_in, c_noise          (`Column`)

Computed in float64. With r = sigma / alpha the noise level, w = r - shift, h^2 = r^2 + sigma_data^2:

    EPS  1 / alpha, -r          V      (alpha, -sigma) / (alpha^2 + sigma^2)     FLOW  1, -t
    X0   0, 1                   SCORE  1 / alpha, sigma r                        all of these: c_in 1, c_noise time_scale t
    VE   1 / alpha, r, c_in 1, c_noise ln(time_scale sigma)
    EDM  c_skip = sigma_data^2 / (w^2 + sigma_data^2) / alpha, c_out = sigma_data w / h, c_in = 1 / (alpha h),
         c_noise = time_scale ln(r) / 4; shift > 0 makes it the consistency model's, D = x / alpha where r = shift
"""

import enum

import torch

from fastdiff.ops import _register


class Law(enum.IntEnum):
    """How alpha and sigma follow from t; p0 and p1 are the law's parameters."""

    VE = 0  # alpha = 1, sigma = t (EDM, VE)
    VP = 1  # log alpha = -t^2 (p1 - p0) / 4 - t p0 / 2, sigma^2 = 1 - alpha^2
    SUB_VP = 2  # the same alpha, sigma = 1 - alpha^2
    TABLE = 3  # log alpha^2 = table[t], linear between indices, constant beyond the ends; sigma^2 = 1 - alpha^2
    FLOW = 4  # alpha = 1 - t, sigma = t
    TRIG = 5  # alpha = cos t, sigma = p0 sin t
    LOG_SNR = 6  # t is lambda = log SNR itself: alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda)


class Target(enum.IntEnum):
    """What the network's output F estimates."""

    EPS = 0
    X0 = 1
    V = 2
    SCORE = 3
    FLOW = 4
    EDM = 5  # and consistency, by its shift
    VE = 6  # sigma times the score


class Column(enum.IntEnum):
    """Columns of the result."""

    ALPHA = 0
    SIGMA = 1
    LOG_SNR = 2
    SKIP = 3  # c_skip
    OUT = 4  # c_out
    IN = 5  # c_in
    NOISE = 6  # c_noise


def _table_law(t, table):
    """log alpha^2 and its slope at t."""
    last = table.shape[0] - 1
    inside = t.clamp(0, last)
    i = inside.nan_to_num(0).floor().clamp(max=last - 1).long()
    slope = table[i + 1] - table[i]
    return table[i] + (inside - i) * slope, torch.where((t >= 0) & (t <= last), slope, 0)


def _path(t, table, law, p0, p1):
    """alpha, sigma and their derivatives by t, float64."""
    one = torch.ones_like(t)
    if law == Law.VE:
        return one, t, 0 * one, one
    if law == Law.FLOW:
        return 1 - t, t, -one, one
    if law == Law.TRIG:
        return t.cos(), p0 * t.sin(), -t.sin(), p0 * t.cos()
    if law == Law.LOG_SNR:
        a, s = t.sigmoid().sqrt(), (-t).sigmoid().sqrt()
        return a, s, a * s**2 / 2, -s * a**2 / 2
    if law == Law.TABLE:
        log, slope = _table_law(t, table)
    else:
        log, slope = -0.5 * t**2 * (p1 - p0) - t * p0, -t * (p1 - p0) - p0
    a, v = (log / 2).exp(), -log.expm1()
    da, dv = a * slope / 2, -log.exp() * slope
    return (a, v, da, dv) if law == Law.SUB_VP else (a, v.sqrt(), da, dv / (2 * v.sqrt()))


def _columns(t, a, s, target, sigma_data, shift, time_scale, raw):
    """c_skip, c_out, c_in, c_noise."""
    one, r = torch.ones_like(t), s / a
    if target == Target.EDM:
        w, h = r - shift, (r**2 + sigma_data**2).sqrt()
        four = sigma_data**2 / (w**2 + sigma_data**2) / a, sigma_data * w / h, 1 / (a * h), time_scale * r.log() / 4
    else:
        q = a**2 + s**2
        skip = {Target.X0: 0 * one, Target.V: a / q, Target.FLOW: one}.get(target, 1 / a)
        out = {Target.X0: one, Target.V: -s / q, Target.SCORE: s * r, Target.FLOW: -t, Target.VE: r}
        four = skip, out.get(target, -r), one, (time_scale * s).log() if target == Target.VE else time_scale * t
    return (*four[:2], one, t) if raw else four


def _column_slopes(t, a, s, da, ds, target, sigma_data, shift, time_scale, raw):
    """Derivatives of the same by t."""
    one, r = torch.ones_like(t), s / a
    zero, dr = 0 * one, (ds - r * da) / a
    if target == Target.EDM:
        w, h2 = r - shift, r**2 + sigma_data**2
        m, h = w**2 + sigma_data**2, h2.sqrt()
        skip = sigma_data**2 / m / a * (-2 * w * dr / m - da / a)
        out = sigma_data * dr * (sigma_data**2 + shift * r) / (h2 * h)
        four = skip, out, -(da / a + r * dr / h2) / (a * h), time_scale * dr / (4 * r)
    else:
        q, dq = a**2 + s**2, 2 * (a * da + s * ds)
        skip = {Target.X0: zero, Target.V: (da - a * dq / q) / q, Target.FLOW: zero}.get(target, -da / a**2)
        out = {Target.X0: zero, Target.V: (s * dq / q - ds) / q, Target.SCORE: ds * r + s * dr, Target.FLOW: -one}
        out[Target.VE] = dr
        four = skip, out.get(target, -dr), zero, ds / s if target == Target.VE else time_scale * one
    return (*four[:2], zero, one) if raw else four


def reference(t, table, law, target, p0, p1, sigma_data, shift, time_scale, raw, slopes, dtype):
    t = t.double()
    a, s, da, ds = _path(t, table, law, p0, p1)
    rest = (target, sigma_data, shift, time_scale, raw)
    if slopes:
        log_snr = torch.ones_like(t) if law == Law.LOG_SNR else 2 * (da / a - ds / s)
        columns = (da, ds, log_snr, *_column_slopes(t, a, s, da, ds, *rest))
    else:
        columns = (a, s, t if law == Law.LOG_SNR else -2 * (s / a).log(), *_columns(t, a, s, *rest))
    return torch.stack(columns, -1).to(dtype)


def _fake(t, table, law, target, p0, p1, sigma_data, shift, time_scale, raw, slopes, dtype):
    return t.new_empty((*t.shape, len(Column)), dtype=dtype)


_register.define(
    "schedule_coefficients",
    "(Tensor t, Tensor? table, int law, int target, float p0, float p1, float sigma_data, float shift,"
    " float time_scale, bool raw, bool slopes, ScalarType dtype) -> Tensor",
    reference,
    _fake,
)


def _save(args, out):
    t, table, *rest, slopes, dtype = args
    tensors = (t,) if table is None else (t, table)
    return tensors, {"arguments": rest, "slopes": slopes, "dtype": dtype, "outputs": 1}


def _slopes(tensors, rest):
    """The derivatives by t, float64 [..., 7]."""
    if rest["slopes"]:
        raise NotImplementedError("schedule_coefficients has no second derivative; write the schedule's formula in torch")
    t, table = tensors[0], tensors[1] if len(tensors) == 2 else None
    return _call(t, table, *rest["arguments"], True, torch.float64)


def _backward(tensors, rest, needs, grad):
    # A column that the loss does not use may have an infinite slope: log SNR at sigma = 0.
    dt = torch.where(grad != 0, grad * _slopes(tensors, rest), 0).sum(-1) if needs[0] else None
    return (None if dt is None else dt.to(tensors[0].dtype), *[None] * 11)


def _jvp(tensors, rest, dt, *_):
    return (dt[..., None] * _slopes(tensors, rest)).to(rest["dtype"])


_call = _register.differentiable("schedule_coefficients", _save, _backward, _jvp)


def schedule_coefficients(
    t: torch.Tensor,  # [...]
    law: int,  # Law
    target: int = Target.EPS,
    p0: float = 0.0,
    p1: float = 0.0,
    *,
    table: torch.Tensor | None = None,  # [T]
    sigma_data: float = 0.5,
    shift: float = 0.0,
    time_scale: float = 1.0,
    raw: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """alpha, sigma, log SNR, c_skip, c_out, c_in, c_noise of every time; the module's docstring gives the formulas.

    `fastdiff.denoiser.DeviceCoefficients` calls this for a Schedule and a Prediction. For a learned schedule (VDM,
    gamma = -log SNR a network of t) pass law LOG_SNR and t = -gamma: gradients reach the network.

    Args:
        t: [...] times in the law's own unit, any real dtype.
        law, target: codes of the path and of the prediction.
        p0, p1: the law's parameters: beta_0, beta_1 (VP, SUB_VP), sigma_data (TRIG).
        table: [T] log alpha^2 at the indices 0 ... T-1, T >= 2; for law TABLE, and only for it.
        sigma_data, shift: EDM's; shift is the noise level at which a consistency model returns x.
        time_scale: on c_noise.
        raw: the network takes x and t themselves, c_in = 1 and c_noise = t.
        dtype: of the result, float32 or float64; float64 where t is, else float32.

    Returns: [..., 7], columns as `Column`. Once differentiable in t, forward and reverse. Nothing is read on the host: where
    alpha = 0 a target that needs 1 / alpha comes out infinite.

    Raises: TypeError, ValueError naming argument, value and remedy.

    Bytes moved: t read, seven numbers a time written.
    References: Song et al. 2021; Kingma et al. 2021 (log SNR); Karras et al. 2022, table 1; Song et al. 2023, appendix C.
    """
    if t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"t: expected real numbers, got {t.dtype}; convert it to float64")
    path, goal = _code("law", law, Law), _code("target", target, Target)
    if (table is not None) != (path == Law.TABLE):
        raise ValueError(f"table: law {path.name} takes {'one' if path == Law.TABLE else 'none'}; pass it for TABLE alone")
    if table is not None:
        _check_table(table, t)
    if goal == Target.FLOW and path != Law.FLOW:
        raise ValueError(f"target: FLOW is n - x0 on the path of law FLOW, not of {path.name}; use V")
    t = t if t.is_floating_point() else t.double()
    dtype = (torch.float64 if t.dtype == torch.float64 else torch.float32) if dtype is None else dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: {dtype} would lose what is computed in float64; use torch.float32 or torch.float64")
    numbers = (float(v) for v in (p0, p1, sigma_data, shift, time_scale))
    return _call(t, table, int(path), int(goal), *numbers, bool(raw), False, dtype)


def _code(name, value, kind):
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{k.name} ({int(k)})" for k in kind)
        raise ValueError(f"{name}: {value!r} is not known; use one of {known}") from None


def _check_table(table, t):
    if table.dtype != torch.float64 or table.dim() != 1 or table.shape[0] < 2:
        raise TypeError(f"table: expected float64 [T], T >= 2, got {table.dtype} of shape {tuple(table.shape)}")
    if table.device != t.device:
        raise ValueError(f"table: is on {table.device}, t on {t.device}; move it to {t.device}")
    if table.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("table: has no gradient here; learn log SNR as a function of t and use law LOG_SNR, or detach it")

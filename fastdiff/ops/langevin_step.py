"""langevin_step: one step of Langevin dynamics towards p_t, the corrector of score SDE, its norms taken on the device.

With the row's coefficients (a table on the device, see `L`), F the network's output at x and z = philox_normal(seeds, draw):

    score = (alpha D - x) / sigma^2 = s_x x + s_F F,    D = c_skip x + c_out F
    eps   = step ||z||^2 / ||score||^2                  step = 2 a snr^2 (Song et al. 2021, algorithms 4 and 5)
    mean  = x + eps score
    x'    = mean + sqrt(2 eps) z

then, in place, x <- x', net_in <- c_in x'. s_x and s_F come from float64 (`langevin_row`): at small sigma alpha D - x
cancels, and in float32 most of its digits with it. A sample whose score is zero everywhere has no direction to follow: its
eps is 0 and it stays where it is.
"""

import enum

import torch

from fastdiff.ops import _register
from fastdiff.ops.denoise_step import _draws, _sample_rows


class L(enum.IntEnum):
    """Columns of the coefficient table, float [rows, len(L)]."""

    SCORE_X = 0  # s_x = (alpha c_skip - 1) / sigma^2
    SCORE_F = 1  # s_F = alpha c_out / sigma^2
    STEP = 2  # 2 a snr^2; with norms=GIVEN eps itself
    NEXT_IN = 3  # c_in of the next evaluation
    NOISE = 4  # c_noise of this row's evaluation; read by the loop, not by the op


class Norms(enum.IntEnum):
    """Which norms set the step size."""

    SAMPLE = 0  # each sample's own: its image does not depend on the batch
    BATCH = 1  # ||z|| and ||score|| averaged over the batch, as in the original code, which couples the samples
    GIVEN = 2  # none: eps is the table's, as in annealed Langevin dynamics, 2 a (snr std)^2


def langevin_row(c_skip, c_out, alpha, sigma, step, next_in=0.0, c_noise=0.0) -> list[float]:
    """One row of the table, from the coefficients of D and the path in float64."""
    score_x, score_f = (alpha * c_skip - 1) / sigma**2, alpha * c_out / sigma**2
    return [float(v) for v in (score_x, score_f, step, next_in, c_noise)]


def reference(x, F, net_in, mean, seeds, coefficients, draws, row, norms):
    c = _sample_rows(coefficients, row, x)
    z = _draws(seeds, draws[row], x)
    score = c[L.SCORE_X] * x + c[L.SCORE_F] * F.to(x.dtype)
    eps = c[L.STEP]
    if norms != Norms.GIVEN and x.numel():
        of_z, of_score = (v.reshape(len(v), -1).norm(dim=1) for v in (z, score))
        if norms == Norms.BATCH:
            of_z, of_score = of_z.mean(0, keepdim=True), of_score.mean(0, keepdim=True)
        ratio = torch.where(of_score == 0, 0, of_z / of_score)
        eps = eps * ratio.square().reshape(-1, *[1] * (x.dim() - 1))
    moved = x + eps * score
    if mean is not None:
        mean.copy_(moved)
    x.copy_(moved + (2 * eps).sqrt() * z)
    net_in.copy_(c[L.NEXT_IN] * x)


def _fake(x, F, net_in, mean, seeds, coefficients, draws, row, norms):
    return None


_register.define(
    "langevin_step",
    "(Tensor(a!) x, Tensor F, Tensor(b!) net_in, Tensor(c!)? mean, Tensor seeds, Tensor coefficients, Tensor draws,"
    " Tensor row, int norms) -> ()",
    reference,
    _fake,
)


def langevin_step(
    x: torch.Tensor,  # float32 (or float64) [B, ...], updated in place
    F: torch.Tensor,  # [B, ...], the network's dtype
    net_in: torch.Tensor,  # [B, ...], the network's dtype and memory format
    seeds: torch.Tensor,  # int64 [B]
    coefficients: torch.Tensor,  # [rows, len(L)], x's dtype
    draws: torch.Tensor,  # int32 [rows], counter word of each row's z
    row: torch.Tensor,  # int64 [1], or [B]: a row per sample
    norms: int = Norms.SAMPLE,
    mean: torch.Tensor | None = None,  # like x
) -> None:
    """One Langevin step in place; the module's docstring gives the formula.

    Noise is z = philox_normal(seeds, draw, domain=Domain.STEP), made where it is used, twice rather than stored. Norms are
    summed in an order fixed by the sample's shape and memory format, whatever the batch and the number of threads. `row` is
    read on the device: one captured graph serves every row, two kernels on a GPU (three for Norms.BATCH). `mean` receives x'
    without its noise, which is what score SDE returns at the end. Not differentiable. NaN in F makes the whole sample NaN
    (with Norms.BATCH the whole batch).

    Raises: TypeError, ValueError naming the argument, its value and what is wanted.

    Bytes moved: x read twice and written, F read twice, net_in written, mean where it is wanted.
    References: Song et al. 2021, "Score-based generative modeling through SDEs", appendix G; Song and Ermon 2019.
    """
    _check(x, F, net_in, mean, seeds, coefficients, draws, row)
    try:
        norms = int(Norms(norms))
    except ValueError:
        raise ValueError(f"norms: {norms!r} is not known; use Norms.SAMPLE, Norms.BATCH or Norms.GIVEN") from None
    torch.ops.fastdiff.langevin_step(x, F, net_in, mean, seeds, coefficients, draws, row, norms)


def _check(x, F, net_in, mean, seeds, coefficients, draws, row):
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: the sampler's state is float32 or float64, got {x.dtype}; convert it, F may stay {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x: expected [B, ...], got a single number")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, F, net_in, mean)):
        raise RuntimeError("langevin_step has no derivative; call it under torch.inference_mode() or torch.no_grad()")
    for name, tensor in (("F", F), ("net_in", net_in), ("mean", mean)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} differs from x, {tuple(x.shape)}")
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if mean is not None and mean.dtype != x.dtype:
        raise TypeError(f"mean: expected x's dtype {x.dtype}, got {mean.dtype}")
    if seeds.dtype != torch.int64 or seeds.shape != x.shape[:1]:
        raise TypeError(f"seeds: expected int64 [{x.shape[0]}], got {seeds.dtype} of shape {tuple(seeds.shape)}")
    if coefficients.dtype != x.dtype or coefficients.dim() != 2 or coefficients.shape[1] != len(L):
        raise ValueError(
            f"coefficients: expected {x.dtype} [rows, {len(L)}], got {coefficients.dtype} {tuple(coefficients.shape)}"
        )
    if draws.dtype != torch.int32 or draws.shape != coefficients.shape[:1]:
        raise ValueError(f"draws: expected int32 [{coefficients.shape[0]}], got {draws.dtype} {tuple(draws.shape)}")
    if row.dtype != torch.int64 or row.shape not in ((1,), x.shape[:1]):
        raise ValueError(f"row: expected int64 [1] or [{x.shape[0]}], got {row.dtype} {tuple(row.shape)}")
    devices = {t.device for t in (x, F, net_in, mean, seeds, coefficients, draws, row) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}; move them to x's")

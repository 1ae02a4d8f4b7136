"""Data whose best denoiser is closed form."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Mixture:
    """p(x0) = sum_k w_k N(mu_k, s_k^2 I), over whole images, or over every pixel by itself.

    E[x0 | alpha x0 + sigma n = x] = sum_k r_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)), v_k = alpha^2 s_k^2 + sigma^2,
    r_k proportional to w_k N(x; alpha mu_k, v_k).
    """

    weights: tuple[float, ...] = (0.6, 0.4)
    means: tuple[float, ...] = (0.5, -0.3)
    stds: tuple[float, ...] = (0.2, 0.3)
    per_pixel: bool = False

    def denoise(self, x: torch.Tensor, alpha: float | torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """D in float64, cast to x's dtype; alpha and sigma are one for all, or [B, 1, 1, 1]."""
        w, mu, s = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        alpha, sigma = (torch.as_tensor(v, dtype=torch.float64)[..., None] for v in (alpha, sigma))
        v = alpha**2 * s**2 + sigma**2
        y = x.double()[..., None]  # [B, C, H, W, 1] against [K]
        log_r = -((y - alpha * mu) ** 2) / (2 * v) - 0.5 * v.log()
        if not self.per_pixel:
            log_r = log_r.sum((1, 2, 3), keepdim=True)
        r = (log_r + w.log()).softmax(-1)
        return (r * (mu + alpha * s**2 / v * (y - alpha * mu))).sum(-1).to(x.dtype)

    def draw(self, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
        """x0 [B, C, H, W], float32."""
        generator = torch.Generator().manual_seed(seed)
        w, mu, s = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        count = torch.Size(shape if self.per_pixel else shape[:1]).numel()
        k = torch.multinomial(w, count, replacement=True, generator=generator)
        k = k.reshape(shape if self.per_pixel else (-1, *[1] * (len(shape) - 1)))
        return (mu[k] + s[k] * torch.randn(shape, generator=generator, dtype=torch.float64)).float()

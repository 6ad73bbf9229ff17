"""Score distillation: the generator's gradient, its weights, and what the fake score minimises.

    x = G(z, tau, c);  x_t = a_t x + s_t e;  Delta = mu_f(x_t) - mu_r(x_t), without a graph
    g = W Delta                                              the gradient with respect to x, up to 1 / (B D)
    L = 0.5 mean (x - sg[x - g])^2,  dL/dx = g / (B D)       the injection: its value 0.5 mean g^2 need not fall
mu_r is the teacher's prediction of x (the real score), mu_f that of a diffusion model trained on the generator's own
samples (the fake score). With Delta at the same x_t: e_r - e_f = (a/s) Delta, score_f - score_r = (a/s^2) Delta, and
v_r - v_f = u_r - u_f = Delta / s; so every weighting of the literature is a W (B, 1, .., 1).
"""

from __future__ import annotations

from torch import Tensor

from kd_diffusion.engine.process import Process, coefficients, expand, renoising

# ---------------------------------------------------------------- the generator


def inject(x: Tensor, g: Tensor) -> Tensor:
    """0.5 mean g^2 with the gradient g / (B D) in x; x, g (B, ...) -> scalar.

    The same as 0.5 mean (x - sg[x - g])^2, without forming the difference of two nearly equal tensors.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> inject(x, torch.tensor([[1.0, -3.0]])).backward()
    >>> x.grad
    tensor([[ 0.5000, -1.5000]])
    """
    g = g.detach()
    return 0.5 * g.square().mean() + ((x - x.detach()) * g).mean()


def dmd_weight(x: Tensor, mu_real: Tensor, eps: float = 1e-6) -> Tensor:
    """W = 1 / (mean_D |x - mu_r| + eps) per sample, (B, 1, .., 1) (arXiv 2405.14867); mu_r already guided.

    eps keeps x = mu_r finite; the authors' code has none and turns the division by zero into 3.4e38.
    """
    return 1 / ((x - mu_real).detach().abs().flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1)) + eps)


def noise_weight(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """W = a_t s_t: s_t^2 (e_r - e_f), the weight of variational score distillation (arXiv 2312.05239)."""
    a, s = coefficients(process, t, like)
    return (a * s).to(like.dtype)


def score_weight(process: Process, t: Tensor, like: Tensor) -> Tensor:
    """W = a_t^2 / s_t^2: a_t (score_f - score_r), the plain gradient of KL(q_t || p_t) (arXiv 2305.18455)."""
    a, s = coefficients(process, t, like)
    return (a / s.clamp_min(1e-6)).square().to(like.dtype)


def flow_weight(process: Process, s: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """W of w (u_r - u_f) with w = a_t r / (a_t s_t + s_t^2), r = a_t / a_s (arXiv 2510.27684), on rectified flow."""
    r, _ = renoising(process, s, t)
    a_t, s_t = process.levels(t)
    return expand(a_t * r / (a_t * s_t + s_t.square()) / s_t, like).to(like.dtype)


def sid_loss(x: Tensor, mu_real: Tensor, mu_fake: Tensor, alpha: float = 1.0, weight: Tensor | None = None) -> Tensor:
    """Score identity distillation (arXiv 2404.04057, eq. 23): sums over D, mean over the batch; -> scalar.

        L = 1/B sum_B sum_D d ((mu_r - x) - alpha d) / sg[max(mean_D |x - mu_r|, 1e-5)],   d = mu_r - mu_f

    mu_real and mu_fake must carry the graph to x (their parameters frozen): the gradient flows through all three. The
    value may be negative. `weight` (B,) replaces samples' share, 0 leaves one out.
    """
    d = mu_real - mu_fake
    rows = (d * ((mu_real - x) - alpha * d)).flatten(1).sum(1) / sid_normaliser(x, mu_real)
    return (rows if weight is None else rows * weight).mean()


def sid_normaliser(x: Tensor, mu_real: Tensor) -> Tensor:
    """max(mean_D |x - mu_r|, 1e-5) per sample, (B,), without a graph."""
    return (x - mu_real).detach().abs().flatten(1).mean(1).clamp_min(1e-5)


# ---------------------------------------------------------------- the fake score


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean_{B,D} weight (prediction - target)^2; weight (B,) or None for 1; -> scalar."""
    error = (prediction - target.detach()).square().flatten(1).mean(1)
    return error.mean() if weight is None else (error * weight.to(error.dtype)).mean()


def edm_weight(s: Tensor, sigma_data: float = 0.5) -> Tensor:
    """lambda = s^-2 + sigma_data^-2, on errors of x (arXiv 2206.00364, table 1).

    >>> import torch
    >>> edm_weight(torch.tensor([0.5, 2.0]))
    tensor([8.0000, 4.2500])
    """
    return s**-2 + sigma_data**-2


def min_snr_plus_one(process: Process, t: Tensor) -> Tensor:
    """snr / (snr + 1) = a^2 / (a^2 + s^2), on errors of v (arXiv 2406.01561's code)."""
    a, s = process.levels(t)
    return a.square() / (a.square() + s.square())

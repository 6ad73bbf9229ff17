"""Kernel ridge regression in rounds of self-distillation, in closed form (arXiv 2102.13088).

Round t fits the targets alpha_t Y + (1 - alpha_t) Y_{t-1}, Y_0 = Y, with the penalty lambda. In the eigenbasis
K = V diag(d) V^T of the training kernel every round is a diagonal filter, so one decomposition gives all of them:

    f_t(x) = kappa(x)^T V diag(C_t) V^T Y,   C_t = (alpha_t + (1 - alpha_t) B_{t-1}) / (d + lambda)
    Y_t    = V diag(B_t) V^T Y,              B_0 = 1,   B_t = d C_t

Nothing is inverted: C_t is finite at d = 0. With one alpha the rounds tend to the ridge fit of penalty lambda / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.errors import InputError


@dataclass(frozen=True)
class Spectrum:
    """K = V diag(d) V^T: values d (n,) float64, not negative, ascending; vectors V (n, n)."""

    values: Tensor
    vectors: Tensor


def spectrum(kernel: Tensor) -> Spectrum:
    """The eigenbasis of a training kernel K (n, n), symmetric and positive semi-definite, in float64.

    Eigenvalues that are negative by rounding become 0. Raises InputError for another shape or for a K that is not
    symmetric or clearly not positive semi-definite.
    """
    kernel = kernel.double()
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) == 0:
        raise InputError(f"kernel: has shape {tuple(kernel.shape)}; allowed: (n, n), the kernel of the training points")
    size = float(kernel.abs().max())
    if not math.isfinite(size) or float((kernel - kernel.T).abs().max()) > 1e-6 * size:
        raise InputError("kernel: is not finite or not symmetric; allowed: a positive semi-definite kernel")
    values, vectors = torch.linalg.eigh(kernel)
    if float(values[0]) < -1e-6 * max(size, float(values[-1])):
        raise InputError(f"kernel: its smallest eigenvalue is {float(values[0]):.3g}; allowed: none below 0")
    return Spectrum(values.clamp_min(0.0), vectors)


def coefficients(values: Tensor, penalty: float, alpha: float, previous: Tensor | None = None) -> Tensor:
    """C_t (n,) of a round from its alpha and the filter B_{t-1} (n,) before it; without one, round 1: 1 / (d + lambda).

    Raises InputError for penalty <= 0.
    """
    if not (penalty > 0 and math.isfinite(penalty)):
        raise InputError(f"penalty = {penalty}: must be a finite number above 0")
    before = torch.ones_like(values) if previous is None else previous
    return (alpha + (1 - alpha) * before) / (values + penalty)


def round_filters(values: Tensor, penalty: float, alphas: Sequence[float]) -> Tensor:
    """B_1 .. B_R, (R, n), of the rounds' alphas (R,); the first does not matter, round 1 fits the true targets.

    >>> round_filters(torch.tensor([1.0, 3.0], dtype=torch.float64), 1.0, [1.0, 0.25])
    tensor([[0.5000, 0.7500],
            [0.3125, 0.6094]], dtype=torch.float64)
    """
    filters: list[Tensor] = []
    for alpha in alphas:
        filters.append(values * coefficients(values, penalty, alpha, filters[-1] if filters else None))
    return torch.stack(filters)


def constant_filter(values: Tensor, penalty: float, alpha: float, rounds: int) -> Tensor:
    """B_t (n,) of round t = `rounds` under one alpha, without the rounds between:

    B_t = B_inf + ((1 - alpha) A)^(t - 1) (A - B_inf),   A = d / (d + lambda).
    """
    first = values / (values + penalty)
    limit = limit_filter(values, penalty, alpha)
    return limit + ((1 - alpha) * first) ** (rounds - 1) * (first - limit)


def limit_filter(values: Tensor, penalty: float, alpha: float) -> Tensor:
    """B_inf = alpha d / (alpha d + lambda) (n,): ridge regression with the penalty lambda / alpha; 0 for alpha = 0."""
    return alpha * values / (alpha * values + penalty)


def dual_coefficients(basis: Spectrum, coefficient: Tensor, targets: Tensor) -> Tensor:
    """V diag(C) V^T Y (n, c) for targets Y (n, c): f(x) is kappa(x)^T times it."""
    return basis.vectors @ (coefficient[:, None] * (basis.vectors.T @ targets))


@dataclass(frozen=True)
class AlphaEstimate:
    """The best weight of the true targets: `raw`, anywhere on the line, and `alpha`, what is used of it."""

    raw: float
    alpha: float


def optimal_alpha(targets: Tensor, supervised: Tensor, distilled: Tensor, *, clip: bool = True) -> AlphaEstimate:
    """The alpha that minimises ||y - (alpha u + (1 - alpha) g)||^2 on validation data:

        alpha* = <y - g, u - g> / ||u - g||^2

    u: predictions of the fit on the true targets (alpha = 1); g: of the fit on the last round's predictions (alpha =
    0); y: the targets; each (m, c) or (m,). Exact for every linear smoother, whose fit is linear in its targets. With
    `clip` the used value is limited to [0, 1]; u = g leaves it undefined, and 1 is given.

    >>> optimal_alpha(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.5]))
    AlphaEstimate(raw=2.0, alpha=1.0)
    """
    y, u, g = (x.detach().double() for x in (targets, supervised, distilled))
    if not (y.shape == u.shape == g.shape) or y.numel() == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in (y, u, g))
        raise InputError(f"targets, supervised, distilled: shapes {shapes}; allowed: one shape (m, c), not empty")
    difference = u - g
    norm = float(difference.square().sum())
    if norm == 0:
        return AlphaEstimate(1.0, 1.0)
    raw = float(((y - g) * difference).sum()) / norm
    return AlphaEstimate(raw, min(1.0, max(0.0, raw)) if clip else raw)


@dataclass(frozen=True)
class Validation:
    """Held-out points: their kernel against the training points (m, n), and targets (m, c)."""

    kernel: Tensor
    targets: Tensor


def choose_alphas(
    basis: Spectrum, penalty: float, targets: Tensor, rounds: int, validation: Validation, *, clip: bool = True
) -> list[AlphaEstimate]:
    """`optimal_alpha` of rounds 2 to `rounds`, each given those before it; round 1 has alpha = 1. Y is (n, c)."""
    rotated = basis.vectors.T @ targets
    projected = validation.kernel @ basis.vectors

    def predict(coefficient: Tensor) -> Tensor:
        return projected @ (coefficient[:, None] * rotated)

    first = coefficients(basis.values, penalty, 1.0)
    supervised, filter_ = predict(first), basis.values * first
    chosen = [AlphaEstimate(1.0, 1.0)]
    for _ in range(rounds - 1):
        distilled = predict(coefficients(basis.values, penalty, 0.0, filter_))
        chosen.append(optimal_alpha(validation.targets, supervised, distilled, clip=clip))
        filter_ = basis.values * coefficients(basis.values, penalty, chosen[-1].alpha, filter_)
    return chosen

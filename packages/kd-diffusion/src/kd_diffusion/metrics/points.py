"""Metrics that need no feature network, for points (N, D) of low dimension, also as (N, D, 1, 1); all in float64.

energy_distance      Székely and Rizzo, J. Stat. Plan. Inference 143 (2013)
sliced_wasserstein   Bonneel et al., J. Math. Imaging Vis. 51 (2015)
mode_coverage        which modes of a known mixture of Gaussians are there, and in which shares
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_diffusion.metrics._sets import distance_sum, pair
from kdcore.errors import InputError


def energy_distance(samples: Tensor, reference: Tensor, *, squared: bool = True) -> float:
    """D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs (a point with itself included); >= 0, 0 for equal sets.

    `squared=False` gives D, as scipy.stats.energy_distance does. Args: samples (N, D), reference (M, D).

    >>> energy_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    10.0
    """
    x, y = pair(samples, reference)
    n, m = len(x), len(y)
    value = 2 * distance_sum(x, y) / (n * m) - distance_sum(x, x) / n**2 - distance_sum(y, y) / m**2
    value = max(0.0, value)
    return value if squared else value**0.5


def sliced_wasserstein(
    samples: Tensor, reference: Tensor, *, projections: int = 128, order: float = 2.0, seed: int = 0
) -> float:
    """(mean over random directions of W_p^p of the projections)^(1/p), p = order; exact per direction, also for N != M.

    Args: samples (N, D), reference (M, D); directions are uniform on the sphere, drawn by `seed`.

    >>> round(sliced_wasserstein(torch.zeros(3, 1), torch.full((2, 1), 5.0)), 6)
    5.0
    """
    if projections < 1:
        raise InputError(f"projections: given {projections}, allowed: >= 1")
    if not order >= 1:
        raise InputError(f"order: given {order}, allowed: >= 1")
    x, y = pair(samples, reference)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)
    x, y = ((z @ directions).sort(dim=0).values for z in (x, y))
    # Both quantile functions are constant between the levels i/N and j/M; in units of 1/(N M) these are integers.
    n, m = len(x), len(y)
    steps = (torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n)
    levels = torch.cat(steps).unique().to(x.device)
    widths = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)
    gap = (x[(levels - 1) // m] - y[(levels - 1) // n]).abs() ** order
    return float((widths @ gap).mean() ** (1 / order))


@dataclass(frozen=True)
class ModeCoverage:
    """Result of `mode_coverage`.

    Attributes:
        coverage: share of the K modes that are covered.
        covered: (K,) bool.
        shares: (K,) float64, share of the points whose nearest mode it is; their sum is 1.
        kl: KL(shares || weights), nats.
        precision: share of the points that lie within `radius` standard deviations of their nearest mode.
    """

    coverage: float
    covered: Tensor
    shares: Tensor
    kl: float
    precision: float

    def metrics(self) -> dict[str, float]:
        """The three numbers under the names mode_coverage, mode_kl and mode_precision."""
        return {"mode_coverage": self.coverage, "mode_kl": self.kl, "mode_precision": self.precision}


def mode_coverage(
    points: Tensor,
    means: Tensor,
    std: float | Sequence[float] | Tensor,
    weights: Sequence[float] | Tensor | None = None,
    *,
    radius: float = 3.0,
    threshold: float = 0.1,
) -> ModeCoverage:
    """Modes of a mixture of isotropic Gaussians that `points` reach.

    A point belongs to the mode that is nearest in units of that mode's standard deviation. A mode is covered when its
    points within `radius` deviations are at least `threshold` times what its weight predicts (and at least one).

    Args:
        points: (N, D) or (N, D, 1, 1). means: (K, D). std: of all modes, or one for each (K,).
        weights: (K,) positive, normalised here; None: equal.
    Raises: InputError on shapes, non-positive std, weights, radius or threshold, and NaN.
    """
    x, mu = pair(points, means)
    sigma, w = _positive("std", std, len(mu), mu.device), _positive("weights", weights, len(mu), mu.device)
    for name, value in (("radius", radius), ("threshold", threshold)):
        if not value > 0:
            raise InputError(f"{name}: given {value}, allowed: > 0")
    w = w / w.sum()
    distance, nearest = (torch.cdist(x, mu, compute_mode="donot_use_mm_for_euclid_dist") / sigma).min(1)
    inside = distance <= radius
    shares = nearest.bincount(minlength=len(mu)).double() / len(x)
    hits = nearest[inside].bincount(minlength=len(mu)).double() / len(x)
    covered = (hits > 0) & (hits >= threshold * w)
    kl = float(torch.special.xlogy(shares, shares / w).sum())
    return ModeCoverage(float(covered.double().mean()), covered, shares, max(0.0, kl), float(inside.double().mean()))


def _positive(name: str, values: float | Sequence[float] | Tensor | None, count: int, device: torch.device) -> Tensor:
    """(K,) float64 from one number, K numbers or None (all 1)."""
    given = torch.as_tensor(1.0 if values is None else values, dtype=torch.float64, device=device)
    if given.ndim == 0:
        given = given.expand(count)
    if given.shape != (count,) or not bool((given.isfinite() & (given > 0)).all()):
        raise InputError(f"{name}: given {values}, allowed: one or {count} positive numbers")
    return given

"""A mixture of Gaussians in the plane: a diffusion teacher that is known in closed form.

Data x ~ sum_k w_k N(m_k, q^2 I). With noise of level s (x_t = x + s e) it stays a mixture, of variance q^2 + s^2, so
density, score and denoiser are exact at every level:

    r_k(x_t)  = softmax_k( log w_k - |x_t - m_k|^2 / 2 (q^2 + s^2) )           responsibilities
    score     = sum_k r_k (m_k - x_t) / (q^2 + s^2)
    E[x|x_t]  = x_t + s^2 score                                                (Tweedie)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdcore.config import Config
from kdcore.errors import InputError


class MixtureConfig(Config):
    """Where the modes lie, and how heavy they are."""

    layout: Literal["grid", "ring"] = Field("grid", description="square grid of side x side modes, or a ring of modes")
    side: int = Field(5, ge=1, description="modes per side of the grid")
    modes: int = Field(8, ge=2, description="modes on the ring")
    extent: float = Field(0.8, gt=0, description="half the side of the grid, or the radius of the ring")
    std: float = Field(0.05, gt=0, description="standard deviation of each mode, per coordinate")
    imbalance: float = Field(1.0, ge=1, description="weight of the heaviest mode over that of the lightest")
    weights: list[float] | None = Field(None, description="weights of the modes; replaces imbalance")

    @model_validator(mode="after")
    def _weights_fit(self) -> MixtureConfig:
        count = self.side**2 if self.layout == "grid" else self.modes
        if self.weights is not None and (len(self.weights) != count or min(self.weights) <= 0):
            raise ValueError(f"has weights {self.weights}; allowed: {count} positive numbers, one a mode")
        return self


class GaussianMixture:
    """means (K, D), weights (K,) that sum to 1, one standard deviation. Everything is computed in float64.

    Points are (..., D) here; diffusion space has them as (B, 2, 1, 1), see `flat`.
    """

    def __init__(self, means: Tensor, weights: Tensor, std: float):
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise InputError(f"means {tuple(means.shape)} and weights {tuple(weights.shape)}; allowed: (K, D) and (K,)")
        if not bool((weights > 0).all()) or not std > 0:
            raise InputError(f"weights {weights.tolist()} and std = {std}: must be positive")
        self.means, self.std = means.double(), float(std)
        self.weights = weights.double() / weights.double().sum()

    @classmethod
    def of(cls, config: MixtureConfig) -> GaussianMixture:
        """The mixture of a config. Unequal weights fall geometrically along the order of the modes.

        The order of a grid's modes is shuffled by a fixed generator, so that heavy modes have light neighbours.
        """
        if config.layout == "grid":
            axis = torch.linspace(-config.extent, config.extent, config.side, dtype=torch.float64)
            means = torch.cartesian_prod(axis, axis)
            means = means[torch.randperm(len(means), generator=torch.Generator().manual_seed(0))]
        else:
            angle = torch.arange(config.modes, dtype=torch.float64) * (2 * math.pi / config.modes)
            means = config.extent * torch.stack([angle.cos(), angle.sin()], 1)
        if config.weights is not None:
            weights = torch.tensor(config.weights, dtype=torch.float64)
        else:
            weights = config.imbalance ** -torch.linspace(0, 1, len(means), dtype=torch.float64)
        return cls(means, weights, config.std)

    def to(self, device: torch.device | str) -> GaussianMixture:
        return GaussianMixture(self.means.to(device), self.weights.to(device), self.std)

    # ------------------------------------------------------------ exact functions at noise level s

    def _log_joint(self, points: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """log w_k N(x_t; m_k, q^2 + s^2) as (..., K), and the variance (...,)."""
        points = _flat(points, self.means.shape[1]).double()
        variance = torch.as_tensor(s, dtype=torch.float64, device=points.device).expand(points.shape[:-1]) ** 2
        variance = variance + self.std**2
        squared = (points[..., None, :] - self.means).pow(2).sum(-1)
        normaliser = 0.5 * points.shape[-1] * torch.log(2 * math.pi * variance)
        return self.weights.log() - squared / (2 * variance[..., None]) - normaliser[..., None], variance

    def log_density(self, points: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """log p_s of points (..., D), with s a number or (...,); float64 (...,)."""
        return self._log_joint(points, s)[0].logsumexp(-1)

    def responsibilities(self, points: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """p(mode | x_t) float64 (..., K)."""
        return self._log_joint(points, s)[0].softmax(-1)

    def score(self, points: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """Gradient of `log_density` in the points, float64 (..., D)."""
        log_joint, variance = self._log_joint(points, s)
        pulled = log_joint.softmax(-1) @ self.means
        return (pulled - _flat(points, self.means.shape[1]).double()) / variance[..., None]

    def denoise(self, points: Tensor, s: Tensor | float) -> Tensor:
        """E[x | x + s e = points], float64 (..., D)."""
        level = torch.as_tensor(s, dtype=torch.float64, device=points.device).expand(points.shape[:-1])
        return points.double() + level[..., None] ** 2 * self.score(points, s)

    # ------------------------------------------------------------ sampling and modes

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(points (count, D) float64, mode of each (count,) int64)."""
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[modes] + self.std * noise, modes

    def assign(self, points: Tensor) -> Tensor:
        """The nearest mode of points (N, D), int64 (N,)."""
        return torch.cdist(_flat(points, self.means.shape[1]).double(), self.means).argmin(1)

    def config_arguments(self) -> dict[str, Any]:
        """Plain numbers that give the same mixture back."""
        return {"means": self.means.tolist(), "weights": self.weights.tolist(), "std": self.std}


def flat(points: Tensor) -> Tensor:
    """Diffusion space (B, D, 1, 1) -> points (B, D)."""
    return points.flatten(1)


def spatial(points: Tensor) -> Tensor:
    """Points (B, D) -> diffusion space (B, D, 1, 1), float32."""
    return points.float()[:, :, None, None]


def _flat(points: Tensor, dimension: int) -> Tensor:
    if points.shape[-1] != dimension:
        raise InputError(f"points: shape {tuple(points.shape)}; allowed: (..., {dimension})")
    return points

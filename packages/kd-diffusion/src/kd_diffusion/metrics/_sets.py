"""Two sets of vectors: checks, and their distances a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdcore.errors import InputError

BLOCK_BYTES = 2**25  # of one (rows, M) block of distances


def vectors(name: str, values: Tensor, *, at_least: int = 1) -> Tensor:
    """(N, ...) -> (N, D) float64, trailing dimensions flattened; InputError as by `check_finite`."""
    check_finite(name, values, at_least=at_least)
    flat = values.detach().flatten(1)
    return (flat.cpu() if flat.device.type == "mps" else flat).double()  # Metal has no float64


def check_finite(name: str, values: Tensor, *, at_least: int = 1) -> None:
    """InputError unless values are (N, ...) of floating point, N >= at_least, with neither NaN nor infinity."""
    if values.ndim < 2 or not values.dtype.is_floating_point:
        raise InputError(f"{name}: given {tuple(values.shape)} {values.dtype}, allowed: (N, ...) of floating point")
    if len(values) < at_least:
        raise InputError(f"{name}: given {len(values)} samples, allowed: at least {at_least}")
    broken = int((~values.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise InputError(f"{name}: {broken} of {len(values)} samples hold NaN or infinity, allowed: finite values")


def pair(samples: Tensor, reference: Tensor, *, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets by `vectors`, on the reference's device; InputError when they differ in D."""
    x = vectors("samples", samples, at_least=at_least)
    y = vectors("reference", reference, at_least=at_least)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"samples: given {x.shape[1]} values a sample, allowed: {y.shape[1]} as in reference")
    return x.to(y.device), y


def labels_of(name: str, labels: Tensor, count: int) -> Tensor:
    """Integer labels (N,); InputError for another shape or type."""
    if labels.shape != (count,) or labels.dtype.is_floating_point or labels.dtype.is_complex:
        given = f"{tuple(labels.shape)} {labels.dtype}"
        raise InputError(f"{name}: given {given}, allowed: integers ({count},), one for each sample")
    return labels.detach()


def distance_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, |x_i - y_j| (rows, M)) for consecutive rows of x (N, D).

    Differences are squared and summed as they are: the expansion x^2 + y^2 - 2xy would give equal points a distance,
    and comparisons with a neighbour's distance would depend on rounding.
    """
    size = max(1, BLOCK_BYTES // (y.element_size() * max(1, len(y))))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")


def distance_sum(x: Tensor, y: Tensor) -> float:
    """sum_ij |x_i - y_j| of x (N, D) and y (M, D)."""
    return sum(float(block.sum()) for _, block in distance_blocks(x, y))

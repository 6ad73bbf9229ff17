"""Maximum mean discrepancy between two sets of features (Gretton et al., JMLR 13, 2012; distillation: 1707.01219)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdcore.losses._checks import check_choice, check_float, check_positive, check_rank
from kdcore.losses._numerics import at_least_float32, matmul

KERNELS = ("linear", "poly", "rbf")


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: Literal["linear", "poly", "rbf"] = "linear",
    *,
    unbiased: bool = False,
    bandwidth: float | None = None,
    degree: int = 3,
    offset: float = 1.0,
) -> Tensor:
    """Squared MMD, E k(x, x') + E k(y, y') - 2 E k(x, y), of samples x (N, ...) and y (M, ...); -> scalar.

        linear  <a, b>                                 the squared distance of the two means
        poly    (<a, b> / D + offset)^degree           degree 3, offset 1 is the kernel of KID (arXiv 1801.01401)
        rbf     exp(-||a - b||^2 / (2 bandwidth^2))    bandwidth None: median distance of the pooled sample, constant

    `unbiased=False` averages over all pairs (>= 0, exactly 0 for equal sets); `unbiased=True` leaves the i = i pairs
    out of the first two means: right in expectation, may be negative, needs N, M >= 2. Trailing dimensions are
    flattened to D. Memory is one N x M matrix a term (none for the biased linear form).
    Raises ValueError when D differs, samples are too few, or the kernel or bandwidth is not allowed.

    >>> import torch
    >>> mmd(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])).item()
    9.0
    """
    check_choice("kernel", kernel, KERNELS)
    for name, z in (("x", x), ("y", y)):
        check_float(name, z)
        check_rank(name, z, 2, "(N, ...)")
        if unbiased and z.shape[0] < 2:
            raise ValueError(f"{name} has {z.shape[0]} example; the unbiased form needs at least 2")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"y has shape {tuple(y.shape)} but x has {tuple(x.shape)}; only the first size may differ")
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    x, y = at_least_float32(x).flatten(1), at_least_float32(y).flatten(1)
    if kernel == "linear" and not unbiased:
        return (x.mean(dim=0) - y.mean(dim=0)).square().sum()

    sigma = (_median_distance(x, y) if bandwidth is None else bandwidth) if kernel == "rbf" else 1.0

    def k(a: Tensor, b: Tensor) -> Tensor:
        if kernel == "rbf":
            return torch.exp(-_distances(a, b).square() / (2 * sigma**2))
        inner = matmul(a, b.T)
        return inner if kernel == "linear" else (inner / a.shape[1] + offset) ** degree

    return _self_mean(k(x, x), unbiased) + _self_mean(k(y, y), unbiased) - 2 * k(x, y).mean()


def _self_mean(gram: Tensor, unbiased: bool) -> Tensor:
    n = gram.shape[0]
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1)) if unbiased else gram.mean()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # not through a^2 + b^2 - 2ab: that loses all digits of near pairs in float32
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def _median_distance(x: Tensor, y: Tensor) -> Tensor:
    """Median of the distances of all distinct pairs of the pooled sample (the lower one of two middle values)."""
    pooled = torch.cat((x, y))
    i, j = torch.triu_indices(len(pooled), len(pooled), offset=1, device=x.device)
    return _distances(pooled, pooled)[i, j].median().clamp_min(1e-12)

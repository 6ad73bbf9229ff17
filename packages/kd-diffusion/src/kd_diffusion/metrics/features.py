"""How far a set of generated samples is from real ones, in features (N, F) of any network; all in float64.

    frechet_distance    Heusel et al., arXiv 1706.08500, eq. 6          between two Gaussians
    kernel_distance     Binkowski et al., arXiv 1801.01401 (KID)        unbiased MMD^2 with the cubic kernel
    precision_recall    Kynkäänniemi et al., arXiv 1904.06991, eq. 1-2  k-nearest-neighbour manifolds
    density_coverage    Naeem et al., arXiv 2002.09797, section 3       the same, without their sensitivity to outliers
    prdc                all four in one pass over the pairs
    diversity           mean distance of two samples of one class, per class

Every function takes the generated `samples` first and the real `reference` second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kd_diffusion.metrics._sets import distance_blocks, distance_sum, labels_of, pair, vectors
from kdcore.errors import InputError
from kdcore.losses import mmd

KERNEL_BLOCK = 2000  # samples of one kernel matrix


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """|m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)) of the means and covariances (divisor N - 1) of two sets; >= 0.

    Args: samples (N, F), reference (M, F), floating point; N, M >= 2. The estimate is biased upwards, the
    more the fewer samples: compare only runs of equal N and M. Raises: InputError on shapes and NaN.
    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(x + 3, x)
    9.0
    """
    x, y = pair(samples, reference, at_least=2)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    # S = A'A with A = (x - m) / sqrt(N - 1) = QR, so tr (S S_r)^(1/2) is the nuclear norm of R R_r': no square root of
    # a matrix is taken, which for nearly singular covariances would lose half of the digits.
    r, r_ref = _factor(x), _factor(y)
    spread = r.square().sum() + r_ref.square().sum() - 2 * torch.linalg.svdvals(r @ r_ref.T).sum()
    return max(0.0, float(shift + spread))


def _factor(x: Tensor) -> Tensor:
    """R (min(N, F), F) with R'R = cov(x)."""
    return torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R


def kernel_distance(samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
    """Unbiased MMD^2 with the kernel (<a, b> / F + 1)^3; about 0 for equal distributions, and may be negative.

    Sets above 2000 samples are dealt at random (by `seed`) into blocks of at most that size, and the blocks' estimates,
    each unbiased, are averaged: memory stays at one block's matrix.
    Args: samples (N, F), reference (M, F), N, M >= 2. Source: Binkowski et al. 2018 (arXiv 1801.01401).
    """
    x, y = pair(samples, reference, at_least=2)
    blocks = min(-(-max(len(x), len(y)) // KERNEL_BLOCK), len(x) // 2, len(y) // 2)
    if blocks > 1:
        generator = torch.Generator().manual_seed(seed)
        x, y = (z[torch.randperm(len(z), generator=generator).to(z.device)] for z in (x, y))
    parts = zip(x.tensor_split(blocks), y.tensor_split(blocks), strict=True)
    return sum(float(mmd(a, b, "poly", unbiased=True)) for a, b in parts) / blocks


class PRDC(NamedTuple):
    """Precision, recall and coverage in [0, 1]; density in [0, M / k], 1 in expectation for equal distributions."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(samples: Tensor, reference: Tensor, k: int = 5) -> PRDC:
    """Precision, recall, density, coverage by balls around each point that reach to its k-th neighbour in its own set.

        precision = mean_j 1[y_j in some ball of a reference x_i]     recall = the same with the two sets exchanged
        density = 1/(k N) sum_ij 1[y_j in ball of x_i]                coverage = mean_i 1[some y_j in ball of x_i]

    Balls are closed: a point at exactly the k-th neighbour's distance is inside. (The authors' code of density and
    coverage leaves it out, which makes a difference for repeated points only.)
    Args: samples y (N, F), reference x (M, F), N, M > k >= 1. Raises: InputError on shapes, NaN, too few samples.
    Source: precision, recall arXiv 1904.06991, eq. 1-2; density, coverage arXiv 2002.09797, section 3.
    """
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k: given {k!r}, allowed: an integer >= 1")
    y, x = pair(samples, reference)
    for name, values in (("samples", y), ("reference", x)):
        if len(values) <= k:
            raise InputError(f"k: given {k} with {len(values)} {name}, allowed: fewer than there are {name}")
    return _prdc(y, x, k)


def _prdc(y: Tensor, x: Tensor, k: int) -> PRDC:
    radius_x, radius_y = _neighbour_distance(x, k), _neighbour_distance(y, k)
    in_some_x = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    pairs = covered = recalled = 0
    for rows, distance in distance_blocks(x, y):
        in_x = distance <= radius_x[rows, None]
        in_some_x |= in_x.any(0)
        pairs += int(in_x.sum())
        covered += int(in_x.any(1).sum())
        recalled += int((distance <= radius_y).any(1).sum())
    precision = int(in_some_x.sum()) / len(y)
    return PRDC(precision, recalled / len(x), pairs / (k * len(y)), covered / len(x))


def _neighbour_distance(x: Tensor, k: int) -> Tensor:
    """(N,) distance of each point to the k-th nearest other one."""
    found = []
    for _, distance in distance_blocks(x, x):
        # A point is its own nearest one at distance 0, so the k-th other one is at place k + 1.
        found.append(distance.kthvalue(k + 1, dim=1).values)
    return torch.cat(found)


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of `prdc`; k = 3 is the choice of arXiv 1904.06991."""
    found = prdc(samples, reference, k)
    return found.precision, found.recall


def density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """(density, coverage) of `prdc`; k = 5 is the choice of arXiv 2002.09797."""
    found = prdc(samples, reference, k)
    return found.density, found.coverage


def diversity(features: Tensor, labels: Tensor | None = None) -> dict[int, float]:
    """Class -> mean distance of two different samples of it: features (N, F), labels (N,) or None for one class 0.

    Classes with a single sample are left out. InputError when none has two.
    """
    x = vectors("features", features, at_least=2)
    classes = _classes("labels", labels, x)
    found = {
        c: distance_sum(part, part) / (len(part) * (len(part) - 1)) for c, part in classes.items() if len(part) > 1
    }
    if not found:
        raise InputError("labels: no class has two samples, allowed: at least one class with two")
    return found


def diversity_ratio(
    samples: Tensor, reference: Tensor, labels: Tensor | None = None, reference_labels: Tensor | None = None
) -> dict[int, float]:
    """Class -> `diversity` of the samples over that of the reference: 0 is a collapsed class, 1 a real one.

    Labels are (N,) and (M,), or None for both. Raises: InputError when no class is in both sets with two samples, or a
    class of the reference is a single repeated point.
    """
    x, y = pair(samples, reference, at_least=2)
    return _ratios(diversity(x, labels), diversity(y, reference_labels))


def variance_ratio(
    samples: Tensor, reference: Tensor, labels: Tensor | None = None, reference_labels: Tensor | None = None
) -> dict[int, float]:
    """Class -> variance over the samples (summed over pixels) over that of the reference; needs no feature network.

    Arguments and errors are those of `diversity_ratio`, on pixels (N, C, H, W) or any (N, ...).
    """
    x, y = pair(samples, reference, at_least=2)
    spread = [
        {c: float(part.var(0).sum()) for c, part in _classes(name, given, z).items() if len(part) > 1}
        for name, given, z in (("labels", labels, x), ("reference_labels", reference_labels, y))
    ]
    return _ratios(*spread)


def _classes(name: str, labels: Tensor | None, x: Tensor) -> dict[int, Tensor]:
    if labels is None:
        return {0: x}
    labels = labels_of(name, labels, len(x)).to(x.device)
    return {int(c): x[labels == c] for c in labels.unique()}


def _ratios(found: dict[int, float], real: dict[int, float]) -> dict[int, float]:
    shared = sorted(found.keys() & real.keys())
    if not shared:
        raise InputError("labels: no class has two samples in both sets, allowed: at least one class that has")
    flat = [c for c in shared if real[c] == 0]
    if flat:
        raise InputError(f"reference: all samples of class {flat[0]} are equal, allowed: samples that differ")
    return {c: found[c] / real[c] for c in shared}

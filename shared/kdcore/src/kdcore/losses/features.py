"""Losses between intermediate features of equal shape (project the student first where widths differ).

Half-precision features are computed and returned in float32. Nothing is detached: compute the teacher under no_grad.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore.losses._checks import check_float, check_positive, check_rank, check_reduction, check_same_shape
from kdcore.losses._numerics import UNIT_EPS, Reduction, at_least_float32, per_example, reduce_rows, unit


def hint_mse(student: Tensor, teacher: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """Hint loss mean (f_s - f_t)^2 over all elements (FitNets, arXiv 1412.6550).

    The paper writes half of the squared norm; the mean is what implementations take, and it keeps one weight usable
    for any feature size (the two differ by the factor D / 2 for D elements an example).

    Shapes (B, ...) both -> scalar, or (B,) means of each example with reduction="none".
    Raises ValueError when the shapes differ.

    >>> import torch
    >>> hint_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
    2.5
    """
    check_same_shape("(B, ...)", 2, student=student, teacher=teacher)
    check_reduction(reduction)
    difference = at_least_float32(student) - at_least_float32(teacher)
    return reduce_rows(per_example(difference.square()), reduction)


def cosine_distance(
    student: Tensor, teacher: Tensor, *, dim: int = -1, eps: float = UNIT_EPS, reduction: Reduction = "batchmean"
) -> Tensor:
    """1 - cos(f_s, f_t) along `dim`, averaged over the other positions; in [0, 2].

    `dim` is -1 for vectors (B, D) and tokens (B, N, D), 1 for maps (B, C, H, W). A vector no longer than `eps` has no
    direction: distance 1, no gradient.

    Shapes (B, ...) both -> scalar, or (B,) with reduction="none". Raises ValueError when the shapes differ, or `dim`
    is the batch.

    >>> import torch
    >>> round(cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])).item(), 6)
    0.4
    """
    s, t = _directions(student, teacher, dim, eps, reduction)
    return reduce_rows(per_example(1 - (s * t).sum(dim=dim)), reduction)


def normalised_mse(
    student: Tensor, teacher: Tensor, *, dim: int = -1, eps: float = UNIT_EPS, reduction: Reduction = "batchmean"
) -> Tensor:
    """||f_s / ||f_s|| - f_t / ||f_t|| ||^2 along `dim`, averaged over the other positions; 2 (1 - cos), in [0, 4].

    The sum over `dim` is not divided by its length. Not to be confused with a squared error relative to the teacher's
    energy (SquareHead). `dim` and `eps` as in `cosine_distance`.

    Shapes (B, ...) both -> scalar, or (B,) with reduction="none". Raises ValueError when the shapes differ, or `dim`
    is the batch.

    >>> import torch
    >>> round(normalised_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])).item(), 6)
    0.8
    """
    s, t = _directions(student, teacher, dim, eps, reduction)
    return reduce_rows(per_example((s - t).square().sum(dim=dim)), reduction)


def feature_norm(features: Tensor, *, p: float = 2.0) -> Tensor:
    """p-norm of each example's flattened features, (B, ...) -> (B,), in at least float32; gradient 0 at 0 for p = 2.

    Raises ValueError for p <= 0 or fewer than two dimensions.

    >>> import torch
    >>> feature_norm(torch.tensor([[3.0, 4.0]]))
    tensor([5.])
    """
    check_float("features", features)
    check_rank("features", features, 2, "(B, ...)")
    check_positive("p", p)
    return torch.linalg.vector_norm(at_least_float32(features).flatten(1), ord=p, dim=1)


def _directions(student: Tensor, teacher: Tensor, dim: int, eps: float, reduction: str) -> tuple[Tensor, Tensor]:
    check_same_shape("(B, ...)", 2, student=student, teacher=teacher)
    check_reduction(reduction)
    if not -student.ndim < dim < student.ndim or dim == 0:
        raise ValueError(f"dim is {dim}; allowed: a feature dimension of shape {tuple(student.shape)}, not the batch")
    return unit(at_least_float32(student), dim, eps), unit(at_least_float32(teacher), dim, eps)

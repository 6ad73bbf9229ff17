"""Sums over all N x N pairs of samples without an N x N tensor, forward or backward.

A relation loss compares student and teacher pair by pair:  L = sum_{ij} l(R(s_i, s_j), R(t_i, t_j)). Rows i are taken
in chunks; each chunk's terms are recomputed in backward (non-reentrant checkpoint), so that the values of one
(chunk, N) block are alive at a time. The price is one more forward pass.

`relation_mse` is the ready case: similarity-preserving distillation (Tung and Mori 2019, arXiv 1907.09682, eq. 4) is
relation="dot", normalise="row"; the distance term of relational distillation (Park et al. 2019, arXiv 1904.05068, eq. 5
and 6, with a square instead of the Huber function) is relation="euclidean", normalise="mean".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcore.errors import InputError, did_you_mean

Relation = Callable[[Tensor, Tensor], Tensor]
CHUNK_BYTES = 2**24  # of one (chunk, N) block; about six are alive while a chunk is differentiated
NORMALISATIONS = ("none", "row", "mean")


def chunked_pairwise(
    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """sum over row chunks c of fn(student[c], student, teacher[c], teacher), each chunk checkpointed.

    Args:
        fn: (rows_s (C, d_S), all_s (N, d_S), rows_t (C, d_T), all_t (N, d_T)) -> scalar part of the sum. It runs a
            second time in backward; tensors it takes from its surroundings get their gradients as usual.
        student, teacher: (N, d_S) and (N, d_T), with or without gradients.
        chunk_rows: C; by default a (C, N) block takes 16 MiB.

    Returns: a scalar of fn's type. Raises: InputError on shapes.

    >>> x = torch.eye(3)
    >>> chunked_pairwise(lambda r, a, _, __: (r @ a.t()).sum(), x, x, chunk_rows=2).item()
    3.0
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) == 0:
        given = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise InputError(f"student, teacher: given {given}, allowed: (N, d_S) and (N, d_T) with the same N > 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise InputError(f"chunk_rows: given {chunk_rows}, allowed: None or an integer >= 1")
    n = len(student)
    size = chunk_rows or max(1, CHUNK_BYTES // (n * student.element_size()))
    parts = [
        checkpoint(fn, student[lo : lo + size], student, teacher[lo : lo + size], teacher, use_reentrant=False)
        for lo in range(0, n, size)
    ]
    return torch.stack(parts).sum()


def dot(rows: Tensor, every: Tensor) -> Tensor:
    """<x_i, y_j>: (C, d), (N, d) -> (C, N)."""
    return rows @ every.t()


def cosine(rows: Tensor, every: Tensor) -> Tensor:
    """<x_i, y_j> / (|x_i| |y_j|): (C, d), (N, d) -> (C, N)."""
    return F.normalize(rows, dim=1) @ F.normalize(every, dim=1).t()


def sq_euclidean(rows: Tensor, every: Tensor) -> Tensor:
    """|x_i - y_j|^2: (C, d), (N, d) -> (C, N); what is below the rounding error of its expansion is 0, gradient too."""
    norms = rows.square().sum(1, keepdim=True) + every.square().sum(1)
    square = norms - 2 * rows @ every.t()
    return torch.where(square > 8 * torch.finfo(square.dtype).eps * norms, square, 0.0)


def euclidean(rows: Tensor, every: Tensor) -> Tensor:
    """|x_i - y_j|, gradient 0 at coinciding points: (C, d), (N, d) -> (C, N)."""
    square = sq_euclidean(rows, every)
    apart = square > 0
    return torch.where(apart, square, 1.0).sqrt() * apart  # sqrt'(0) is infinite


RELATIONS: dict[str, Relation] = {
    "dot": dot,
    "cosine": cosine,
    "sq_euclidean": sq_euclidean,
    "euclidean": euclidean,
}


def relation_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    relation: str | Relation = "cosine",
    normalise: str = "none",
    chunk_rows: int | None = None,
) -> Tensor:
    """(1/N^2) sum_{ij} (R_S(i,j) - R_T(i,j))^2 over all pairs, without the two N x N matrices.

    Args:
        student, teacher: (N, d_S) and (N, d_T); the teacher gets no gradient.
        relation: one of `RELATIONS`, or a function (C, d), (N, d) -> (C, N).
        normalise: "none"; "row" divides each row of R by its L2 norm; "mean", for distances, divides R by its mean over
            the pairs i != j.
        chunk_rows: rows of R at a time.

    Returns: a scalar. Raises: InputError for an unknown relation or normalisation, and on shapes.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> relation_mse(x, torch.ones(2, 2), relation="dot").item()
    2.5
    """
    if normalise not in NORMALISATIONS:
        raise InputError(f"normalise: given {normalise!r}{did_you_mean(str(normalise), NORMALISATIONS)}")
    if isinstance(relation, str):
        if relation not in RELATIONS:
            raise InputError(f"relation: given {relation!r}{did_you_mean(relation, RELATIONS)}")
        relation = RELATIONS[relation]
    if normalise == "mean" and relation in (dot, cosine):
        raise InputError(f"normalise: given 'mean' with {relation.__name__!r}, allowed: distances (R(i, i) = 0)")
    teacher = teacher.detach()
    scale_s = scale_t = teacher.new_ones(())
    if normalise == "mean":
        scale_s = _mean_distance(relation, student, chunk_rows)
        scale_t = _mean_distance(relation, teacher, chunk_rows)

    def part(rows_s: Tensor, all_s: Tensor, rows_t: Tensor, all_t: Tensor) -> Tensor:
        r_s, r_t = relation(rows_s, all_s), relation(rows_t, all_t)
        if normalise == "row":
            r_s, r_t = F.normalize(r_s, dim=1), F.normalize(r_t, dim=1)
        elif normalise == "mean":
            r_s, r_t = r_s / scale_s, r_t / scale_t
        return (r_s - r_t).square().sum()

    return chunked_pairwise(part, student, teacher, chunk_rows=chunk_rows) / len(student) ** 2


def _mean_distance(distance: Relation, x: Tensor, chunk_rows: int | None) -> Tensor:
    """Mean over the pairs i != j (a sample is at distance 0 from itself); differentiable."""
    if len(x) < 2:
        raise InputError(f"normalise: given 'mean' for {len(x)} sample, allowed: at least 2 samples")
    total = chunked_pairwise(lambda rows, every, _, __: distance(rows, every).sum(), x, x, chunk_rows=chunk_rows)
    return total / (len(x) * (len(x) - 1))

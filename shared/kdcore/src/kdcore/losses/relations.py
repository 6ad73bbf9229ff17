"""Losses and measures on relations between the examples of a batch: correlation, RKD, similarity-preserving, CKA.

Features are (N, ...) with trailing dimensions flattened; student and teacher widths may differ, rows must be the same
examples. Half precision is computed and returned in float32, Gram matrices outside autocast. Memory is N x N (angles:
N x N x N). Nothing is detached: compute the teacher under no_grad.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.losses._checks import check_batch_pair, check_same_shape
from kdcore.losses._numerics import UNIT_EPS, at_least_float32, centred_unit, matmul, unit


def pearson_correlation(x: Tensor, y: Tensor, *, dim: int = -1, eps: float = UNIT_EPS) -> Tensor:
    """Pearson's rho along `dim`, cos(x - mean x, y - mean y); 0, without gradient, where one side does not vary
    (its centred norm is at most eps, or only rounding).

    Two tensors of one shape -> that shape without `dim`. Raises ValueError when the shapes differ.

    >>> import torch
    >>> round(pearson_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 3.0, 1.0])).item(), 6)
    -1.0
    """
    check_same_shape("(...)", 1, x=x, y=y)
    x, y = at_least_float32(x), at_least_float32(y)
    return (centred_unit(x, dim, dim, eps) * centred_unit(y, dim, dim, eps)).sum(dim=dim)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance-wise relational distillation (arXiv 1904.05068, RKD-D).

        L = mean_{i != j} huber(d_ij(s) / mu_s - d_ij(t) / mu_t),   mu = mean_{i != j} d_ij,   d_ij = ||f_i - f_j||_2

    huber has delta = 1. Mean over the N (N - 1) pairs of distinct examples; released code divides by N^2, so its
    weight (25) is smaller by (N - 1) / N here.

    Shapes (N, ...), (N, ...), N >= 2 -> scalar. Raises ValueError when N differs or is too small.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> rkd_distance(2 * x + 1, x).item()
    0.0
    """
    s, t = _flat_pair(student, teacher, least=2)
    pairs = len(s) * (len(s) - 1)
    d_s, d_t = _mean_scaled_distances(s, pairs), _mean_scaled_distances(t, pairs)
    return F.smooth_l1_loss(d_s, d_t, reduction="sum") / pairs  # the diagonal adds 0


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Angle-wise relational distillation (arXiv 1904.05068, RKD-A).

        L = mean_{i, j, k distinct} huber(cos_ijk(s) - cos_ijk(t))
        cos_ijk = <e_ij, e_kj>,   e_ij = (f_i - f_j) / ||f_i - f_j||

    Mean over the N (N - 1)(N - 2) triples of distinct examples; released code divides by N^3 (weight 50 there).
    Coincident examples have no direction: cosine 0, no gradient. Memory N^2 D + N^3.

    Shapes (N, ...), (N, ...), N >= 3 -> scalar. Raises ValueError when N differs or is too small.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(rkd_angle(x @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]]), x).item(), 6)      # rotated and scaled
    0.0
    """
    s, t = _flat_pair(student, teacher, least=3)
    n = len(s)
    same = torch.eye(n, dtype=torch.bool, device=s.device)
    repeated = same[:, :, None] | same[:, None, :] | same[None, :, :]
    difference = (_vertex_cosines(s) - _vertex_cosines(t)).masked_fill(repeated, 0.0)
    total = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="sum")
    return total / (n * (n - 1) * (n - 2))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation (arXiv 1907.09682).

        L = (1 / N^2) ||G_s - G_t||_F^2,   G = row-wise L2 normalised A A^T,   A (N, D) flattened activations

    Shapes (N, ...), (N, ...) -> scalar. Raises ValueError when N differs.

    >>> import torch
    >>> a = torch.eye(2)
    >>> similarity_preserving(a, torch.ones(2, 3)).item()       # (1, 0) against (1, 1) / sqrt 2 in each row
    0.2928...
    """
    s, t = _flat_pair(student, teacher, least=1)
    return (unit(matmul(s, s.T), dim=1) - unit(matmul(t, t.T), dim=1)).square().mean()


def cka_linear(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred (arXiv 1905.00414).

    A similarity in [0, 1]; use 1 - cka_linear(...) as a loss. Invariant to rotations and one scale of either side.
    Biased upwards when N is small against D (`cka_unbiased`). Works with N x N or D x D matrices, whichever is
    smaller. Constant features give 0.

    Shapes (N, ...), (N, ...), N >= 2 -> scalar. Raises ValueError when N differs or is too small.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [2.0, 0.0, 2.0], [0.0, 3.0, 1.0], [0.0, 2.0, 0.0]])
    >>> round(cka_linear(x, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])).item(), 5)
    0.98108
    """
    x, y = (_centred_to_unit(z) for z in _flat_pair(x, y, least=2, names=("x", "y")))
    if len(x) <= max(x.shape[1], y.shape[1]):
        k, l = matmul(x, x.T), matmul(y, y.T)
        cross = (k * l).sum()
    else:
        k, l = matmul(x.T, x), matmul(y.T, y)
        cross = matmul(y.T, x).square().sum()
    norms = torch.linalg.matrix_norm(k) * torch.linalg.matrix_norm(l)
    return cross / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def hsic_unbiased(k: Tensor, l: Tensor) -> Tensor:
    """Unbiased estimator HSIC_1 of Hilbert-Schmidt independence (Song et al. 2012; arXiv 2010.15327, eq. 3).

        HSIC_1 = [ tr(K~ L~) + (1' K~ 1)(1' L~ 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1' K~ L~ 1 ] / (n (n - 3))

    K~, L~ are the Gram matrices with a zero diagonal. May be negative. Shapes (n, n), (n, n), n >= 4 -> scalar.
    Raises ValueError for another shape.
    """
    check_same_shape("(n, n)", 2, k=k, l=l)
    n = k.shape[0]
    if k.ndim != 2 or k.shape[1] != n or n < 4:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must be (n, n) with n >= 4")
    k, l = (_without_diagonal(at_least_float32(m)) for m in (k, l))
    rows_k, rows_l = k.sum(dim=1), l.sum(dim=1)
    total = (k * l).sum() + rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k * rows_l).sum()
    return total / (n * (n - 3))


def cka_unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA from unbiased HSIC_1 (Nguyen et al., arXiv 2010.15327, eq. 2 for one batch).

        HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)),   K = X X^T,  L = Y Y^T

    Numerator and denominator are free of the bias that makes `cka_linear` near 1 for N << D; the value may be
    slightly negative. 0 when one side carries no relation (all off-diagonal similarities equal).

    Shapes (N, ...), (N, ...), N >= 4 -> scalar. Raises ValueError when N differs or is too small.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    >>> round(cka_unbiased(x, 3 * x.flip(1) + 1).item(), 5)
    1.0
    """
    # HSIC_1 does not change when features are shifted; centring and scaling only keep float32 accurate
    x, y = (_centred_to_unit(z) for z in _flat_pair(x, y, least=4, names=("x", "y")))
    return _alignment(*_hsic_triple(x, y))


def cka_minibatch(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Minibatch CKA: HSIC_1 terms averaged over batches, one ratio at the end (arXiv 2010.15327, eq. 2).

        [mean_b HSIC_1(K_b, L_b)] / sqrt([mean_b HSIC_1(K_b, K_b)] [mean_b HSIC_1(L_b, L_b)])

    `batches` yields (x, y) of shapes (N_b, ...), (N_b, ...), N_b >= 4; a generator is read once and one batch is held
    at a time, so a whole data set fits (call under no_grad to measure; with gradients every batch's graph is kept).
    The value does not depend on the batch size beyond noise. Batches count equally. -> scalar.
    Raises ValueError when no batch came, or N differs or is too small in one.

    >>> import torch
    >>> x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    >>> round(cka_minibatch((b, 2 * b) for b in x).item(), 5)
    1.0
    """
    sums: tuple[Tensor, ...] | None = None
    for x, y in batches:
        x, y = _flat_pair(x, y, least=4, names=("x", "y"))
        terms = _hsic_triple(x - x.mean(dim=0), y - y.mean(dim=0))
        sums = terms if sums is None else tuple(a + b for a, b in zip(sums, terms))
    if sums is None:
        raise ValueError("batches is empty; at least one (x, y) pair is needed")
    return _alignment(*sums)


def _flat_pair(
    a: Tensor, b: Tensor, *, least: int, names: tuple[str, str] = ("student", "teacher")
) -> tuple[Tensor, Tensor]:
    check_batch_pair(least, **{names[0]: a, names[1]: b})
    return at_least_float32(a).flatten(1), at_least_float32(b).flatten(1)


def _mean_scaled_distances(x: Tensor, pairs: int) -> Tensor:
    # exact differences: a^2 + b^2 - 2ab loses near pairs in float32
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d / (d.sum() / pairs).clamp_min(1e-12)


def _vertex_cosines(x: Tensor) -> Tensor:
    """cos[j, i, k]: the angle at j between i and k, (N, N, N)."""
    e = unit(x[None, :, :] - x[:, None, :], dim=-1)
    return matmul(e, e.transpose(1, 2))


def _centred_to_unit(x: Tensor) -> Tensor:
    return centred_unit(x, centre=0, dim=(0, 1), eps=0.0)


def _without_diagonal(k: Tensor) -> Tensor:
    return k.masked_fill(torch.eye(len(k), dtype=torch.bool, device=k.device), 0.0)


def _hsic_triple(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC_1 of (K, L), (K, K), (L, L); a self term that is rounding noise of its own sum becomes 0."""
    k, l = matmul(x, x.T), matmul(y, y.T)
    return hsic_unbiased(k, l), _above_noise(k), _above_noise(l)


def _above_noise(k: Tensor) -> Tensor:
    value = hsic_unbiased(k, k)
    noise = 16 * torch.finfo(k.dtype).eps * _without_diagonal(k).square().mean().detach()
    return torch.where(value > noise, value, 0.0)


def _alignment(hsic_xy: Tensor, hsic_xx: Tensor, hsic_yy: Tensor) -> Tensor:
    defined = (hsic_xx > 0) & (hsic_yy > 0)
    norm = torch.where(defined, hsic_xx, 1.0).sqrt() * torch.where(defined, hsic_yy, 1.0).sqrt()
    return torch.where(defined, hsic_xy / norm, 0.0)

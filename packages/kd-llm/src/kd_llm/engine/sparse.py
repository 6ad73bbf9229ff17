"""Pruning of weight matrices to a share of zeros or to an N:M pattern: by magnitude and by SparseGPT.

SparseGPT (arXiv 2301.00774) prunes a matrix W (out, in) so that W X changes least on calibration inputs X (in, n).
With H = 2 X X^T + lambda I, lambda = 0.01 mean diag(2 X X^T), and C the upper Cholesky factor of H^-1, columns are
visited from left to right:

    score_ij = W_ij^2 / C_jj^2                                  which entries go
    e_j      = (w_j - pruned w_j) / C_jj                        what column j loses, in the metric of H
    W_{:,k} <- W_{:,k} - e_j C_jk   for k > j                   the columns to the right make up for it

C_jj times row j of C is the first row of the inverse of H restricted to columns j.., so each step is the exact
optimal-brain-surgeon update for the columns that are still open. Scores of an unstructured mask are read once per
block of 128 columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """How many zeros, and where: a `share` of all entries, or `keep` of every `group` consecutive inputs stay.

    >>> Pattern.parse("2:4").share
    0.5
    """

    share: float
    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, value: float | str, *, field: str = "sparsity") -> Pattern:
        """A number in [0, 1), or "N:M" with 0 < N < M. Raises InputError otherwise."""
        allowed = "allowed: a share of zeros in [0, 1), or 'N:M' (N of M consecutive inputs stay), for example '2:4'"
        if isinstance(value, str):
            keep, colon, group = value.partition(":")
            if not (colon and keep.isdecimal() and group.isdecimal() and 0 < int(keep) < int(group)):
                raise InputError(f"{field} = {value!r}: {allowed}")
            return cls(1 - int(keep) / int(group), int(keep), int(group))
        if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value < 1):
            raise InputError(f"{field} = {value!r}: {allowed}")
        return cls(float(value))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.group else f"{self.share:g}"

    def kept(self, scores: Tensor) -> Tensor:
        """Scores (out, in) -> bool mask of what stays: the largest, over the whole matrix or in each group of a row.

        Exactly round(share * entries) entries go; equal scores go in the order of their position.
        """
        rows, columns = scores.shape
        if not self.group:
            gone = scores.flatten().sort(stable=True).indices[: round(self.share * scores.numel())]
            mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
            mask[gone] = False
            return mask.view(rows, columns)
        groups = scores.reshape(rows, columns // self.group, self.group)
        gone = groups.sort(dim=-1, stable=True).indices[..., : self.group - self.keep]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).view(rows, columns)

    def check(self, columns: int, name: str) -> None:
        """Raises InputError where rows of `columns` inputs are not whole groups."""
        if self.group and columns % self.group:
            raise InputError(
                f"sparsity = '{self}': {name} has {columns} inputs, not a multiple of {self.group}; "
                f"choose a pattern whose M divides {columns}, or leave the layer out"
            )


def prune_by_magnitude(weight: Tensor, pattern: Pattern, *, name: str = "weight") -> Tensor:
    """Weight (out, in) with its smallest entries set to zero; the others are untouched."""
    pattern.check(_matrix(weight, name).shape[1], name)
    return weight * pattern.kept(weight.abs())


class Hessian:
    """Running 2/n sum of x x^T over calibration inputs x, (in, in) in float32 or better. Its scale plays no part."""

    def __init__(self, columns: int, device: torch.device, dtype: torch.dtype = torch.float32):
        self.value = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """Rows (n, in) of inputs; none is allowed."""
        n = len(inputs)
        if n == 0:
            return
        x = inputs.to(self.value.dtype)
        self.count += n
        self.value.mul_(1 - n / self.count).addmm_(x.t(), x, alpha=2 / self.count)


def prune_by_sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, *, block: int = 128, damping: float = 0.01, name: str = "weight"
) -> Tensor:
    """Weight (out, in) pruned by SparseGPT for a Hessian (in, in); the kept entries are corrected, see the module.

    block: columns whose scores are read together and whose later updates are applied in one product; cut down to whole
        groups of an N:M pattern, whose result does not depend on it.
    damping: lambda / mean diag(H).
    An input that is always zero has no say: its column becomes zero. Returns a new tensor of weight's dtype.
    Raises InputError for shapes that do not fit, a Hessian that is not finite, or one that damping leaves singular.
    """
    columns = _matrix(weight, name).shape[1]
    pattern.check(columns, name)
    if hessian.shape != (columns, columns):
        raise InputError(f"hessian of {name}: shape {tuple(hessian.shape)}; expected ({columns}, {columns})")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w, h = weight.detach().to(dtype).clone(), hessian.to(dtype).clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    c = _inverse_factor(h, damping, name).to(dtype)
    width = max(block // pattern.group, 1) * pattern.group if pattern.group else block
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        errors = _prune_columns(w[:, part], c[part, part], pattern)
        w[:, part.stop :] -= errors @ c[part, part.stop :]
    return w.to(weight.dtype)


def _prune_columns(w: Tensor, c: Tensor, pattern: Pattern) -> Tensor:
    """Prunes a block of columns (out, b) in place, left to right; returns the errors (out, b)."""
    scale = c.diagonal().square()
    errors = torch.zeros_like(w)
    kept = torch.empty_like(w, dtype=torch.bool)
    if not pattern.group:
        kept = pattern.kept(w.square() / scale)
    for j in range(w.shape[1]):
        if pattern.group and j % pattern.group == 0:  # with the updates of the groups before it
            group = slice(j, j + pattern.group)
            kept[:, group] = pattern.kept(w[:, group].square() / scale[group])
        pruned = w[:, j] * kept[:, j]
        errors[:, j] = (w[:, j] - pruned) / c[j, j]
        w[:, j] = pruned
        w[:, j + 1 :] -= errors[:, j, None] * c[j, j + 1 :]
    return errors


def _inverse_factor(h: Tensor, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse of h + damping * mean(diag h) I, computed in float64 where there is one."""
    if not torch.isfinite(h).all():
        raise InputError(f"calibration: the inputs of {name} are not finite")
    if not (damping > 0 and math.isfinite(damping)):
        raise InputError(f"damping = {damping}: must be a finite number above 0")
    h.diagonal().add_(damping * h.diagonal().mean())
    h = h if h.device.type == "mps" else h.double()
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError:
        raise InputError(
            f"damping = {damping}: the Hessian of {name} is singular to working precision; give more calibration "
            "text or a larger damping"
        ) from None


def _matrix(weight: Tensor, name: str) -> Tensor:
    if weight.ndim != 2:
        raise InputError(f"{name}: shape {tuple(weight.shape)}; pruning takes a matrix (out, in)")
    return weight

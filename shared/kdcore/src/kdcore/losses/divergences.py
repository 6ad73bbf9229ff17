"""Divergences between the class distributions of a teacher and a student, all over logits.

Notation of every function: z student logits, t teacher logits, tau temperature, p = softmax(t / tau) the teacher,
q = softmax(z / tau) the student; a row is one distribution.

    forward KL     sum p ln(p / q)                            mean-seeking
    reverse KL     sum q ln(q / p)                            mode-seeking
    JSD            b KL(p, m) + (1 - b) KL(q, m)              m = b p + (1 - b) q
    skewed KL      KL(p, a p + (1 - a) q), KL(q, a q + (1 - a) p)
    symmetric KL   (KL(p, q) + KL(q, p)) / 2
    TV             sum abs(p - q) / 2

Shared conventions. Shapes (..., C), floating point, finite; half precision is computed and returned in float32,
float64 stays. `reduction="batchmean"` is the mean over all rows (every leading dimension, so a (B, T, V) input is
averaged over B * T), a scalar; `"none"` gives the rows (...,). `scale_by_tau2=True` multiplies by tau^2, which keeps
the gradient of the KL family of one size as tau grows (Hinton et al., arXiv 1503.02531, section 2); at tau = 1 it
changes nothing. Nothing is detached: compute teacher logits under no_grad. Every function raises ValueError naming
the argument when shapes, class counts, temperature or a mixing weight do not fit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kdcore.losses._checks import check_choice, check_logits, check_positive, check_reduction
from kdcore.losses._numerics import Reduction, at_least_float32, reduce_rows


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """KL(teacher || student) = sum_c p_c (ln p_c - ln q_c); dD/dz = (q - p) / tau (arXiv 1503.02531).

    (..., C), (..., C) -> scalar, or (...,) with reduction="none". ValueError as in the module docstring.

    >>> import torch
    >>> z, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.6931472, 0.0]])
    >>> round(forward_kl(z, t).item(), 5)
    0.26172
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _finish(_kl(log_p, log_q), temperature, scale_by_tau2, reduction)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """KL(student || teacher) = sum_c q_c (ln q_c - ln p_c) (MiniLLM, arXiv 2306.08543, single step).

    (..., C), (..., C) -> scalar, or (...,) with reduction="none". ValueError as in the module docstring.

    >>> import torch
    >>> z, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.6931472, 0.0]])
    >>> round(reverse_kl(z, t).item(), 5)
    0.26406
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _finish(_kl(log_q, log_p), temperature, scale_by_tau2, reduction)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 0.5,
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Generalised Jensen-Shannon beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q (arXiv 2306.13649).

    Bounded by the entropy of (beta, 1 - beta), so by ln 2. It tends to 0 at both ends of beta, hence 0 < beta < 1:
    ask for `forward_kl` or `reverse_kl` by name (some trainers redefine beta = 0 and 1 as those).
    (..., C), (..., C) -> scalar, or (...,) with reduction="none". ValueError as in the module docstring.

    >>> import torch
    >>> z, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.6931472, 0.0]])
    >>> round(jensen_shannon(z, t).item(), 5)
    0.06385
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}; it must lie strictly between 0 and 1 "
            "(the divergence vanishes at both ends: use forward_kl or reverse_kl)"
        )
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return _finish(rows, temperature, scale_by_tau2, reduction)


def skewed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    alpha: float = 0.1,
    direction: Literal["forward", "reverse"] = "forward",
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Skewed KL of DistiLLM (arXiv 2402.03898): forward KL(p, alpha p + (1 - alpha) q), reverse KL(q, alpha q +
    (1 - alpha) p).

    0 <= alpha < 1; alpha = 0 is the plain KL of that direction, alpha > 0 bounds it by -ln alpha.
    (..., C), (..., C) -> scalar, or (...,) with reduction="none". ValueError as in the module docstring.

    >>> import torch
    >>> z, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.6931472, 0.0]])
    >>> bool(skewed_kl(z, t, alpha=0.1) < skewed_kl(z, t, alpha=0.0))
    True
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must satisfy 0 <= alpha < 1 (the divergence is 0 at alpha = 1)")
    check_choice("direction", direction, ("forward", "reverse"))
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    log_a, log_b = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    rows = _kl(log_a, _log_mixture(log_a, log_b, alpha) if alpha > 0 else log_b)
    return _finish(rows, temperature, scale_by_tau2, reduction)


def symmetric_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Half of Jeffreys' divergence, sum_c (q_c - p_c)(ln q_c - ln p_c) / 2 (SSLD, arXiv 2103.05959).

    SSLD calls it JS; it is not `jensen_shannon` (near equality it is 4 times larger, and it has no upper bound).
    (..., C), (..., C) -> scalar, or (...,) with reduction="none". ValueError as in the module docstring.

    >>> import torch
    >>> z, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.6931472, 0.0]])
    >>> round(symmetric_kl(z, t).item(), 5)
    0.26289
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    rows = 0.5 * ((log_q.exp() - log_p.exp()) * (log_q - log_p)).sum(dim=-1)
    return _finish(rows, temperature, scale_by_tau2, reduction)


def total_variation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Total variation distance sum_c abs(p_c - q_c) / 2, in [0, 1] before the tau^2 factor (arXiv 2307.15190).

    (..., C), (..., C) -> scalar, or (...,) with reduction="none". ValueError as in the module docstring.

    >>> import torch
    >>> z, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986123, 0.0]])
    >>> round(total_variation(z, t).item(), 5)
    0.25
    """
    log_q, log_p = _log_distributions(student_logits, teacher_logits, temperature)
    return _finish(0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1), temperature, scale_by_tau2, reduction)


def _log_distributions(z: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """ln q, ln p of (..., C) logits, in at least float32."""
    check_logits(z, t)
    check_positive("temperature", temperature)
    log_q = torch.log_softmax(at_least_float32(z) / temperature, dim=-1)
    log_p = torch.log_softmax(at_least_float32(t) / temperature, dim=-1)
    return log_q, log_p


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of every row."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """ln(weight a + (1 - weight) b), 0 < weight < 1."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _finish(rows: Tensor, temperature: float, scale_by_tau2: bool, reduction: str) -> Tensor:
    check_reduction(reduction)
    return reduce_rows(rows * temperature**2 if scale_by_tau2 else rows, reduction)

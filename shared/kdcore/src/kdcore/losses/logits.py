"""Distillation losses on classifier logits: soft targets, standardised logits, DKD, DIST, focal distillation.

z student logits, t teacher logits, tau temperature, p = softmax(t / tau), q = softmax(z / tau), y labels.
Half-precision logits are computed and returned in float32. Nothing is detached: compute the teacher under no_grad.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdcore.losses._checks import (
    check_choice,
    check_float,
    check_labels,
    check_logits,
    check_positive,
    check_rank,
    check_reduction,
)
from kdcore.losses._numerics import Reduction, at_least_float32, reduce_rows
from kdcore.losses.divergences import forward_kl
from kdcore.losses.relations import pearson_correlation


def soft_target_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    scale_by_tau2: bool = True,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Hinton's soft-target loss tau^2 KL(p || q), teacher || student (arXiv 1503.02531, section 2).

    The tau^2 is part of the convention: it keeps the soft gradient comparable to the cross-entropy's when tau changes.
    `scale_by_tau2=False` leaves it out. The same function as `divergences.forward_kl`, under the name users look for.

    Shapes (..., C), (..., C) -> scalar mean over rows, or (...,) with reduction="none".
    Raises ValueError when shapes or class counts differ, or temperature <= 0.

    >>> import torch
    >>> z, t = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, 1.0]])
    >>> round(soft_target_kl(z, t, 4.0).item(), 5)
    0.2453
    """
    return forward_kl(student_logits, teacher_logits, temperature, scale_by_tau2=scale_by_tau2, reduction=reduction)


def standardise_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """z-score of every row, (z - mean(z)) / (std(z) + eps) (logit standardisation, arXiv 2403.01427).

    std is the sample standard deviation (divisor C - 1), as in the authors' release. Apply it to both sides before
    a temperature loss; the base temperature then takes over the scale.

    Shape (..., C), C >= 2 -> (..., C). Raises ValueError for fewer than 2 classes.

    >>> import torch
    >>> standardise_logits(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[-1.0000,  0.0000,  1.0000]])
    """
    check_float("logits", logits)
    check_rank("logits", logits, 1, "(..., C)")
    if logits.shape[-1] < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; a standard deviation needs at least 2 classes")
    z = at_least_float32(logits)
    z = z - z.mean(dim=-1, keepdim=True)
    # ||z|| / sqrt(C - 1) is std(z), with a finite gradient (0) where all logits of a row are equal
    std = torch.linalg.vector_norm(z, dim=-1, keepdim=True) / (logits.shape[-1] - 1) ** 0.5
    return z / (std + eps)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Decoupled knowledge distillation tau^2 (alpha TCKD + beta NCKD) (arXiv 2203.08679).

        TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))     target class against the rest
        NCKD = KL(p^ || q^)                             softmax over the C - 1 other classes

    With alpha = 1 and beta = 1 - p_y (per sample) it is the plain KL.

    Shapes (..., C), (..., C), integer labels (...,) in 0..C-1 -> scalar mean over rows, or (...,) with
    reduction="none". Raises ValueError on mismatched shapes or class counts, C < 2, or labels out of range (range
    read on the CPU only).

    >>> import torch
    >>> z, t = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> dkd(z, t, torch.tensor([0])).item()
    0.0
    """
    check_logits(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    if classes < 2:
        raise ValueError(f"student_logits has {classes} class; dkd needs at least 2")
    check_labels(labels, student_logits, of="student_logits", classes=classes)
    check_positive("temperature", temperature)
    check_reduction(reduction)

    target = labels.long().unsqueeze(-1)
    others = torch.arange(classes - 1, device=labels.device)
    others = others + (others >= target)  # the ids without y
    log_q = torch.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_p = torch.log_softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    log_q_other, log_p_other = log_q.gather(-1, others), log_p.gather(-1, others)
    # ln(1 - q_y) as a log-sum-exp: 1 - q_y rounds to 0 for a confident model
    log_q_rest = log_q_other.logsumexp(dim=-1, keepdim=True)
    log_p_rest = log_p_other.logsumexp(dim=-1, keepdim=True)

    log_p_two = torch.cat((log_p.gather(-1, target), log_p_rest), dim=-1)
    log_q_two = torch.cat((log_q.gather(-1, target), log_q_rest), dim=-1)
    tckd = (log_p_two.exp() * (log_p_two - log_q_two)).sum(dim=-1)
    log_p_hat, log_q_hat = log_p_other - log_p_rest, log_q_other - log_q_rest
    nckd = (log_p_hat.exp() * (log_p_hat - log_q_hat)).sum(dim=-1)
    return reduce_rows(temperature**2 * (alpha * tckd + beta * nckd), reduction)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: match correlations instead of values (arXiv 2205.10536).

        L = tau^2 [ beta (1/B) sum_i (1 - rho(q_i:, p_i:))  +  gamma (1/C) sum_j (1 - rho(q_:j, p_:j)) ]

    rho is Pearson's correlation; the first term runs over the classes of a sample (inter-class), the second over the
    samples of a class (intra-class). The tau^2 is the release's. A row or column without variance counts as rho = 0
    and sends no gradient, so a batch of one has a constant intra-class term.

    Shapes (B, C), (B, C) -> scalar. Raises ValueError on any other or mismatched shape, or temperature <= 0.

    >>> import torch
    >>> z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
    >>> round(dist(z, z + 5.0).item(), 5)
    0.0
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.ndim != 2:
        raise ValueError(f"student_logits has shape {tuple(student_logits.shape)}; dist needs (B, C)")
    check_positive("temperature", temperature)
    q = torch.softmax(at_least_float32(student_logits) / temperature, dim=-1)
    p = torch.softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    inter = 1 - pearson_correlation(q, p, dim=1).mean()
    intra = 1 - pearson_correlation(q, p, dim=0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def focal_weights(reference_logits: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 5.0) -> Tensor:
    """w_i = alpha + beta 1[argmax_k r_ik = y_i] (arXiv 2511.08322; positive-congruent training).

    (..., K) logits, integer labels (...,) -> (...,) weights without gradient. A label >= K is allowed and never
    matches: the reference may know fewer classes than the data. Ties of argmax go to torch's choice of index.
    Raises ValueError when labels do not fit the rows.

    >>> import torch
    >>> focal_weights(torch.tensor([[1.0, -1.0], [0.0, 2.0]]), torch.tensor([0, 2]))
    tensor([6., 1.])
    """
    check_float("reference_logits", reference_logits)
    check_rank("reference_logits", reference_logits, 2, "(..., K)")
    check_labels(labels, reference_logits, of="reference_logits", classes=None)
    right = reference_logits.argmax(dim=-1) == labels
    return alpha + beta * right.to(at_least_float32(reference_logits).dtype)


def focal_distillation(
    student_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.0,
    temperature: float = 5.0,
    form: Literal["kl", "logits"] = "kl",
    reduction: Reduction = "batchmean",
) -> Tensor:
    """Distillation weighted by whether the reference is right (MPT, arXiv 2511.08322).

        kl      (1/B) sum_i w_i KL(softmax(r_i / tau) || softmax(z_i / tau))       without tau^2
        logits  (1/B) sum_i w_i (1/2) (1/K) sum_k (z_ik - r_ik)^2                  tau unused

    w of `focal_weights`. For a reference with fewer classes slice the student's logits first, then call this: the
    softmax must run over the shared classes only.

    Shapes (..., K), (..., K), integer labels (...,) -> scalar mean over rows, or (...,) with reduction="none".
    Raises ValueError on mismatched shapes or class counts, temperature <= 0, or an unknown form.

    >>> import torch
    >>> z, r = torch.tensor([[2.0, 0.0], [0.5, 1.5]]), torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    >>> round(focal_distillation(z, r, torch.tensor([0, 2])).item(), 7)
    0.0024306
    """
    check_choice("form", form, ("kl", "logits"))
    check_logits(student_logits, reference_logits, teacher="reference_logits")
    check_reduction(reduction)
    weights = focal_weights(reference_logits, labels, alpha, beta)
    if form == "kl":
        rows = forward_kl(student_logits, reference_logits, temperature, scale_by_tau2=False, reduction="none")
    else:
        difference = at_least_float32(student_logits) - at_least_float32(reference_logits)
        rows = 0.5 * difference.square().mean(dim=-1)
    return reduce_rows(weights * rows, reduction)

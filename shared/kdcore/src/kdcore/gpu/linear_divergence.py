r"""Divergence between two language-model heads that never holds a (tokens x vocabulary) tensor.

Student hidden rows H_S (N, d_S) and head W_S (V, d_S) give logits z, teacher H_T (N, d_T) and W_T (V, d_T) give t.
With q = softmax(z / tau), p = softmax(t / tau) and r = dD/dq, every divergence here has the row gradient

    dD/dz = q (r - sum_v q_v r_v) / tau                                     (softmax Jacobian applied to r)

    kind             D                                                      r, up to a constant
    forward          KL(p, q) = sum p ln(p/q)                               -p/q      (so dD/dz = (q - p)/tau)
    reverse          KL(q, p)                                               ln(q/p)
    js               beta KL(p, m) + (1-beta) KL(q, m), m = beta p + (1-beta) q      (1-beta) ln(q/m)
    skew             KL(p, m), m = alpha p + (1-alpha) q                    -(1-alpha) p/m
    skew_reverse     KL(q, m), m = alpha q + (1-alpha) p                    ln(q/m) - alpha q/m
    total_variation  sum |p - q| / 2                                        sign(q - p)/2

For C rows at a time: z and t by two matrix products, D and G = w dD/dz row block by row block (small enough for the
processor's cache), G written over z, then dH = G W_S and dW += G^T H. Two buffers (C, V) in the accumulation type
serve all chunks. The gradients are ready when the forward pass ends; backward multiplies them by the upstream scalar.

Sources: softmax Jacobian as above; js: Agarwal et al. 2024 (arXiv 2306.13649, eq. 1); skew: Ko et al. 2024
(arXiv 2402.03898, eq. 4); gradients in the forward pass of a chunked head: Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore.errors import InputError, did_you_mean
from kdcore.gpu._chunks import (
    HeadSpec,
    Student,
    accumulation_dtype,
    check_chunks,
    check_device,
    check_head,
    make_plan,
    per_row,
    weighted_sum,
)
from kdcore.gpu._terms import KINDS, DenseRows, Teacher, check_divergence

__all__ = ["KINDS", "REDUCTIONS", "HeadSpec", "linear_divergence"]

REDUCTIONS = ("mean", "sum", "none")


def linear_divergence(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    head_s: HeadSpec = HeadSpec(),
    head_t: HeadSpec = HeadSpec(),
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    reduction: str = "mean",
    scale_by_tau2: bool = True,
    recompute: bool = False,
    chunk_bytes: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """D(teacher, student) over a large vocabulary from hidden states and heads; the module docstring has the kinds.

    Args:
        hidden_s, hidden_t: (..., d_S) and (..., d_T), equal leading shapes: states after the final norm.
        weight_s, weight_t: (V, d_S) and (V, d_T). A frozen `weight_s` costs no (V, d_S) accumulator.
        kind: one of `KINDS`. `beta` in (0, 1) mixes js, `alpha` in [0, 1) the skew kinds.
        bias_s, bias_t: (V,); an entry of -inf masks an output.
        head_s, head_t: logit scale and softcap of each model.
        labels: (...,) integers, aligned with the rows: those equal to `ignore_index` are dropped.
        weights: (...,) non-negative constants; rows of weight 0 are dropped before the first matrix product.
        reduction: "mean" is sum(w D) / sum(w) over the kept rows (0 when none is kept), "sum" is sum(w D), "none" is
            w D in the leading shape, 0 at dropped rows.
        scale_by_tau2: multiply by temperature^2, so that gradients keep their size as the temperature grows.
        recompute: keep the inputs and compute the gradients in backward instead of in forward (always so for "none").
        chunk_bytes: limit for the two (C, V) buffers and the working blocks: 2**27 on CPU, 2**28 elsewhere by default.
        chunk_tokens: C itself.

    Returns: a scalar, or the leading shape for "none"; float32, or float64 when an input is float64. bf16 and fp16
    inputs are accumulated in float32, inside `torch.autocast` too (operands are never rounded down to its type).
    The gradients reach `hidden_s`, `weight_s` and `bias_s` alone, once (no double backward).
    Raises: InputError on shapes, vocabularies or values that do not fit.

    >>> h, w = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    >>> round(linear_divergence(h, w, 2 * h, w).item(), 6)
    0.067131
    """
    _check_options(kind, temperature, beta, alpha, reduction, chunk_bytes, chunk_tokens)
    _check_shapes(hidden_s, weight_s, bias_s, hidden_t, weight_t, bias_t)
    lead = hidden_s.shape[:-1]
    rows_s, rows_t = hidden_s.reshape(-1, hidden_s.shape[-1]), hidden_t.detach().reshape(-1, hidden_t.shape[-1])
    dtype = accumulation_dtype(hidden_s, weight_s, hidden_t)
    w, kept = _row_weights(lead, labels, ignore_index, weights, dtype, hidden_s.device)
    if kept is not None:
        rows_s, rows_t, w = rows_s.index_select(0, kept), rows_t.index_select(0, kept), w[kept]
    factor = temperature**2 if scale_by_tau2 else 1.0
    if reduction == "mean" and len(w):
        factor = factor / w.sum()
    teacher = Teacher(rows_t, weight_t.detach(), None if bias_t is None else bias_t.detach(), head_t)
    terms = (DenseRows(teacher, kind, float(temperature), beta if kind == "js" else alpha),)
    student = Student(rows_s, weight_s, bias_s)
    plan = make_plan(student, terms, head_s, dtype, chunk_bytes, chunk_tokens)
    if recompute or reduction == "none":
        rows = per_row(student, terms, plan)[0] * (w * factor)
        if reduction != "none":
            return rows.sum()
        return (rows if kept is None else rows.new_zeros(lead.numel()).index_copy(0, kept, rows)).view(lead)
    return weighted_sum(student, terms, (w * factor).unsqueeze(0), plan)[0]


def _row_weights(lead, labels, ignore_index, weights, dtype, device) -> tuple[Tensor, Tensor | None]:
    """Weights (rows,) and the indices of the rows to keep, None for all of them."""
    for name, given in (("labels", labels), ("weights", weights)):
        if given is not None and given.shape != lead:
            raise InputError(f"{name}: given shape {tuple(given.shape)}, allowed: the rows' shape {tuple(lead)}")
    w = torch.ones(lead.numel(), dtype=dtype, device=device)
    keep = torch.ones_like(w, dtype=torch.bool)
    if weights is not None:
        if weights.requires_grad:
            raise InputError('weights: given with requires_grad, allowed: constants; multiply reduction="none" by them')
        w = weights.reshape(-1).to(w)
        if not bool((w.isfinite() & (w >= 0)).all()):
            raise InputError("weights: given a negative or non-finite value, allowed: finite numbers >= 0")
        keep &= w != 0
    if labels is not None:
        keep &= labels.reshape(-1).to(device) != ignore_index
    if (weights is None and labels is None) or bool(keep.all()):
        return w, None
    return w, keep.nonzero().squeeze(1)


def _check_options(kind, temperature, beta, alpha, reduction, chunk_bytes, chunk_tokens) -> None:
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction: given {reduction!r}{did_you_mean(str(reduction), REDUCTIONS)}")
    check_divergence("", kind, temperature, beta, alpha)
    check_chunks(chunk_bytes, chunk_tokens)


def _check_shapes(h_s, w_s, b_s, h_t, w_t, b_t) -> None:
    if h_s.shape[:-1] != h_t.shape[:-1]:
        given = f"{tuple(h_s.shape)} and {tuple(h_t.shape)}"
        raise InputError(f"hidden_s, hidden_t: given {given}, allowed: equal shapes but for the last dimension")
    check_head("hidden_s, weight_s", "bias_s", h_s, w_s, b_s)
    check_head("hidden_t, weight_t", "bias_t", h_t, w_t, b_t)
    if len(w_s) != len(w_t):
        raise InputError(
            f"weight_s, weight_t: given vocabularies of {len(w_s)} (student) and {len(w_t)} (teacher) entries, "
            "allowed: equal ones; where ids 0..n-1 are the same tokens in both, pass weight[:n] of each"
        )
    check_device(h_s, w_s, b_s, h_t, w_t, b_t)

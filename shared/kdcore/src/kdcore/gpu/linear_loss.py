r"""Several losses of one language-model head from one pass over it: cross-entropy, distillation, or both.

Hidden rows H (N, d) and a head W (V, d) give logits y = head(H W^T + b). Each term k has row values L_ki and constant
row weights w_ki (a mask, example weights, one over the number of tokens), and

    total = sum_k weight_k sum_i w_ki L_ki

    CrossEntropy   L_i = -ln softmax(y_i)_label
    Dense          L_i = tau^2 D(p_i, q_i): a teacher's hidden rows and head; kinds as in kdcore.gpu.linear_divergence
    Sparse         L_i = tau^2 D(p_i, q_i): a teacher's k most probable outputs; modes as in kdcore.gpu.topk

One student matrix product per chunk of rows serves all terms, no (N, V) tensor exists, and the gradients are ready when
the forward pass ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import InputError, did_you_mean
from kdcore.gpu._chunks import (
    HeadSpec,
    Student,
    Term,
    accumulation_dtype,
    check_chunks,
    check_device,
    check_head,
    make_plan,
    per_row,
    weighted_sum,
)
from kdcore.gpu._terms import CrossEntropyRows, DenseRows, SparseRows, Teacher, check_divergence, check_temperature
from kdcore.gpu.topk import MODES, TopK

__all__ = ["CrossEntropy", "Dense", "HeadSpec", "LinearLoss", "Sparse", "linear_loss"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy:
    """Cross-entropy to `labels` (N,) int64, at temperature 1; a label is read where its row weight is not 0."""

    labels: Tensor
    row_weights: Tensor
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """Divergence to a teacher's softmax, from its hidden rows (N, d_t) and head (V, d_t); both sides at `temperature`.

    kind: one of `kdcore.gpu.linear_divergence.KINDS`; beta in (0, 1) mixes js, alpha in [0, 1) the skew kinds.
    bias_t (V,), head_t: the teacher's. scale_by_tau2: multiply by temperature^2. No gradient reaches the teacher.
    """

    hidden_t: Tensor
    weight_t: Tensor
    row_weights: Tensor
    kind: str = "forward"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    bias_t: Tensor | None = None
    head_t: HeadSpec = HeadSpec()
    scale_by_tau2: bool = True
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse:
    """Divergence to a teacher's k most probable outputs `topk`: ids, logp (N, k) and log_missing (N,).

    mode: tail, truncated or renormalised, and what `temperature` does in each: kdcore.gpu.topk.
    """

    topk: TopK
    row_weights: Tensor
    mode: str = "tail"
    temperature: float = 1.0
    scale_by_tau2: bool = True
    weight: float = 1.0


@dataclass(frozen=True)
class LinearLoss:
    """total: scalar with gradient. values, rows: each term's sum_i w_i L_i and L (N,), without `weight`, detached.

    A row of weight 0 in a term is not computed there: its value is 0.
    """

    total: Tensor
    values: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    terms: Sequence[CrossEntropy | Dense | Sparse],
    *,
    bias: Tensor | None = None,
    head: HeadSpec = HeadSpec(),
    recompute: bool = False,
    chunk_bytes: int | None = None,
    chunk_tokens: int | None = None,
) -> LinearLoss:
    """The weighted sum of `terms` on the logits head(hidden weight^T + bias), never holding all of them.

    Args:
        hidden: (N, d) states after the final norm. weight: (V, d); a frozen one costs no (V, d) accumulator.
        terms: at least one. `row_weights` (N,) are constants >= 0; rows of weight 0 in every term are dropped before
            the first matrix product, and a term costs nothing on rows of weight 0 of its own. A term of `weight` 0
            has its values and rows computed but no gradient.
        bias: (V,); an entry of -inf masks an output. head: logit scale and softcap.
        recompute: keep the inputs and compute the gradients in backward instead of in forward.
        chunk_bytes: limit for the (C, V) buffers and working blocks: 2**27 on CPU, 2**28 elsewhere by default.
        chunk_tokens: C itself.

    Types: float32, or float64 when `hidden`, `weight` or a `hidden_t` is float64. bf16 and fp16 inputs are accumulated
    in float32, inside `torch.autocast` too: its type is not applied to the operands, so a float32 head is a float32
    product; give `weight.bfloat16()` (differentiable) for a bf16 one. The gradients reach `hidden`, `weight` and
    `bias` alone, once (no double backward).
    Raises: InputError on shapes, vocabularies or values that do not fit.

    >>> h, w, one = torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.ones(1)
    >>> ce = CrossEntropy(labels=torch.tensor([0]), row_weights=one)
    >>> kl = Dense(hidden_t=2 * h, weight_t=w, row_weights=one, weight=0.5)
    >>> loss = linear_loss(h, w, [ce, kl])
    >>> round(loss.total.item(), 6), [round(value.item(), 6) for value in loss.values]
    (0.346827, [0.313262, 0.067131])
    """
    _check(hidden, weight, bias, terms, chunk_bytes, chunk_tokens)
    dtype = accumulation_dtype(hidden, weight, *(term.hidden_t for term in terms if isinstance(term, Dense)))
    row_weights = torch.stack([term.row_weights.to(dtype) for term in terms])  # (K, N)
    index, own = _kept_rows(row_weights, terms)
    n = hidden.shape[0]
    if index is not None:
        hidden, row_weights = hidden.index_select(0, index), row_weights[:, index]
    runs = [_rows_of(k, term, own[k], index, len(weight)) for k, term in enumerate(terms)]
    # Cross-entropy first: it only reads the logits and their softmax, which a divergence overwrites.
    order = sorted(range(len(terms)), key=lambda k: not isinstance(terms[k], CrossEntropy))
    scales = torch.tensor([_scale(terms[k]) for k in order], dtype=dtype).to(hidden.device).unsqueeze(1)
    importance = torch.tensor([float(terms[k].weight) for k in order], dtype=dtype).to(hidden.device).unsqueeze(1)
    row_weights = row_weights[order]
    student, ordered = Student(hidden, weight, bias), [runs[k] for k in order]
    plan = make_plan(student, ordered, head, dtype, chunk_bytes, chunk_tokens)
    full = row_weights * scales * importance
    if recompute:
        rows = per_row(student, ordered, plan)
        total, rows = (rows * full).sum(), rows.detach()
    else:
        total, rows = weighted_sum(student, ordered, full, plan)
    rows = rows * scales
    values = (rows * row_weights).sum(1)
    if index is not None:
        rows = rows.new_zeros(len(terms), n).index_copy_(1, index, rows)
    place = [order.index(k) for k in range(len(terms))]
    return LinearLoss(total, tuple(values[i] for i in place), tuple(rows[i] for i in place))


def _kept_rows(row_weights: Tensor, terms: Sequence[Any]) -> tuple[Tensor | None, list[Tensor | None]]:
    """Rows with a weight in some term, and each term's places among them; None stands for all."""
    active = row_weights != 0
    kept = active.any(0)
    valid = (row_weights.isfinite() & (row_weights >= 0)).all()
    # One transfer to the host for all that must be known there.
    flags = torch.cat([valid.view(1), kept.all().view(1), (active == kept).all(1)]).tolist()
    if not flags[0]:
        _refuse_weights(terms)
    index = None if flags[1] else kept.nonzero().squeeze(1)
    among = active if index is None else active[:, index]
    return index, [None if all_kept else a.nonzero().squeeze(1) for a, all_kept in zip(among, flags[2:])]


def _scale(term: CrossEntropy | Dense | Sparse) -> float:
    return 1.0 if isinstance(term, CrossEntropy) or not term.scale_by_tau2 else float(term.temperature) ** 2


def _rows_of(k: int, term: Any, own: Tensor | None, index: Tensor | None, vocab: int) -> Term:
    """The term on its rows `own` (None: all) among the kept rows `index` (None: all)."""
    chosen = index if own is None else own if index is None else index[own]

    def take(x: Tensor) -> Tensor:
        return x.detach() if chosen is None else x.detach().index_select(0, chosen)

    if isinstance(term, Dense):
        bias = None if term.bias_t is None else term.bias_t.detach()
        teacher = Teacher(take(term.hidden_t), term.weight_t.detach(), bias, term.head_t)
        mixing = term.beta if term.kind == "js" else term.alpha
        return DenseRows(teacher, term.kind, float(term.temperature), mixing, own)
    if isinstance(term, CrossEntropy):
        labels = take(term.labels).long()
        _check_ids(f"terms[{k}].labels", labels, vocab)
        return CrossEntropyRows(labels, own)
    topk = TopK(take(term.topk.ids), take(term.topk.logp), take(term.topk.log_missing))
    _check_ids(f"terms[{k}].topk.ids", topk.ids, vocab)
    return SparseRows(topk, term.mode, float(term.temperature), own)


def _check_ids(where: str, ids: Tensor, vocab: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab:
        allowed = f"0 to {vocab - 1} in rows of weight other than 0"
        raise InputError(f"{where}: given values from {low} to {high}, allowed: {allowed}")


def _refuse_weights(terms: Sequence[Any]) -> None:
    for k, term in enumerate(terms):
        if not bool((term.row_weights.isfinite() & (term.row_weights >= 0)).all()):
            raise InputError(
                f"terms[{k}].row_weights: given a negative or non-finite value, allowed: finite numbers >= 0"
            )


def _check(hidden, weight, bias, terms, chunk_bytes, chunk_tokens) -> None:
    check_chunks(chunk_bytes, chunk_tokens)
    check_head("hidden, weight", "bias", hidden, weight, bias)
    if hidden.ndim != 2:
        raise InputError(f"hidden: given shape {tuple(hidden.shape)}, allowed: (N, d)")
    if not terms:
        raise InputError("terms: given none, allowed: one or more of CrossEntropy, Dense, Sparse")
    tensors = [hidden, weight, bias]
    for k, term in enumerate(terms):
        where = f"terms[{k}]"
        if not isinstance(term, CrossEntropy | Dense | Sparse):
            raise InputError(f"{where}: given {type(term).__name__}, allowed: CrossEntropy, Dense or Sparse")
        _check_rows(f"{where}.row_weights", term.row_weights, (len(hidden),))
        if term.row_weights.requires_grad:
            raise InputError(f"{where}.row_weights: given with requires_grad, allowed: constants")
        _check_term(f"{where}.", term, hidden, weight)
        held = [getattr(term, field.name) for field in fields(term)]
        tensors += [x for x in held if isinstance(x, Tensor)]
        if isinstance(term, Sparse):
            tensors += [term.topk.ids, term.topk.logp, term.topk.log_missing]
    check_device(*tensors)


def _check_term(where: str, term: CrossEntropy | Dense | Sparse, hidden: Tensor, weight: Tensor) -> None:
    n, vocab = len(hidden), len(weight)
    if isinstance(term, CrossEntropy):
        _check_rows(f"{where}labels", term.labels, (n,))
        if term.labels.is_floating_point():
            raise InputError(f"{where}labels: given {term.labels.dtype}, allowed: integers")
    elif isinstance(term, Dense):
        check_divergence(where, term.kind, term.temperature, term.beta, term.alpha)
        check_head(f"{where}hidden_t, {where}weight_t", f"{where}bias_t", term.hidden_t, term.weight_t, term.bias_t)
        _check_rows(f"{where}hidden_t", term.hidden_t, (n, term.weight_t.shape[1]))
        if len(term.weight_t) != vocab:
            raise InputError(
                f"{where}weight_t: given a vocabulary of {len(term.weight_t)} entries, allowed: the student's {vocab}; "
                "where ids 0..n-1 are the same tokens in both, pass weight[:n] of each"
            )
    else:
        check_temperature(where, term.temperature)
        if term.mode not in MODES:
            raise InputError(f"{where}mode: given {term.mode!r}{did_you_mean(str(term.mode), MODES)}")
        k = term.topk.ids.shape[-1] if term.topk.ids.ndim else 0
        _check_rows(f"{where}topk.ids", term.topk.ids, (n, max(k, 1)))
        _check_rows(f"{where}topk.logp", term.topk.logp, (n, k))
        _check_rows(f"{where}topk.log_missing", term.topk.log_missing, (n,))


def _check_rows(where: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(given.shape) != shape:
        raise InputError(f"{where}: given shape {tuple(given.shape)}, allowed: {shape}")

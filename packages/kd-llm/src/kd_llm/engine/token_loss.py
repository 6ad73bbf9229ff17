"""Cross-entropy and divergence to a teacher on the rows that predict a label: one pass over the student's head.

    total = sum_i w_i [ soft D(p_i, q_i) + hard (-ln q_i(y_i)) ]

Where student and teacher have linear heads this is `kdcore.gpu.linear_loss` and no (N, V) tensor exists. A head of
another form (see `kd_llm.engine.heads`) has given logits (N, V) already; the same mathematics then runs on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.distiller import LossTerms
from kdcore.gpu import HeadSpec, TopK
from kdcore.gpu.linear_loss import CrossEntropy, Dense, Sparse, linear_loss
from kdcore.gpu.topk import outcome_divergence
from kdcore.losses import divergences as d

if TYPE_CHECKING:
    from kd_llm.engine.objective import HiddenRows


@dataclass(frozen=True)
class Divergence:
    """Kind and parameters of a divergence, as `kdcore.gpu.linear_divergence` and `kdcore.gpu.topk` name them."""

    kind: str = "forward"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    topk_mode: str = "tail"


@dataclass(frozen=True)
class DenseSignal:
    """A teacher's rows (N, d_t) and head (V_t, d_t); weight_t None: hidden_t holds its logits (N, V_t)."""

    hidden_t: Tensor
    weight_t: Tensor | None
    bias_t: Tensor | None = None
    head_t: HeadSpec = HeadSpec()

    def logits(self) -> Tensor:
        """(N, V_t), for few rows or measurements."""
        from kd_llm.engine.heads import finish_logits

        if self.weight_t is None:
            return self.hidden_t
        return finish_logits(F.linear(self.hidden_t.to(self.weight_t.dtype), self.weight_t, self.bias_t), self.head_t)


Signal = DenseSignal | TopK


def token_terms(
    rows: HiddenRows,
    signal: Signal | None,
    weights: Tensor,
    divergence: Divergence,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    *,
    hard_weights: Tensor | None = None,
    vocabulary: int | None = None,
) -> LossTerms:
    """Terms "soft" (with a signal) and "hard" (with hard_weight > 0) of rows of N predicting tokens.

    Args:
        weights: (N,) row weights w_i >= 0; `hard_weights` replaces them in the cross-entropy.
        vocabulary: number of first outputs that both models share; None: all of them.

    The value of each term is sum_i w_i L_i; together they are one pass, so their gradients cannot be had apart.
    """
    n = vocabulary if vocabulary is not None and signal is not None else None
    hard_weights = weights if hard_weights is None else hard_weights
    labels = rows.labels
    if n is not None and hard_weight:  # a label among the student's own tokens beyond the shared ones has no output
        hard_weights = torch.where(labels < n, hard_weights, 0.0)
        labels = labels.clamp(max=n - 1)
    names, importance, terms = [], [], []
    linear = rows.head.linear and not (isinstance(signal, DenseSignal) and signal.weight_t is None)
    if signal is not None:
        names.append("soft")
        importance.append(soft_weight)
        terms.append(_soft(signal, weights, divergence, soft_weight, n))
    if hard_weight or signal is None:
        names.append("hard")
        importance.append(hard_weight)
        terms.append(CrossEntropy(labels=labels, row_weights=hard_weights, weight=hard_weight))
    if not len(labels):
        zero = rows.hidden.sum() * 0.0  # a batch without labels still has a graph, which DDP waits for
        return LossTerms({name: (weight, zero) for name, weight in zip(names, importance)})
    if not linear:
        return LossTerms({k: (w, _on_logits(rows, t, n)) for k, w, t in zip(names, importance, terms, strict=True)})
    hidden, weight = _autocast(rows.hidden), _autocast(cut(rows.head.weight, n))
    fused = linear_loss(hidden, weight, terms, bias=cut(rows.head.bias, n), head=rows.head.spec)
    return joined(names, importance, fused.values, fused.total)


def joined(names: list[str], weights: list[float], values: Any, total: Tensor) -> LossTerms:
    """Terms with the given values whose weighted sum has the gradient of `total`: the first one carries all of it."""
    terms = LossTerms({name: (weight, value) for name, weight, value in zip(names, weights, values, strict=True)})
    carrier = next(name for name, weight in zip(names, weights) if weight != 0)
    weight, value = terms[carrier]
    terms[carrier] = (weight, value + (total - total.detach()) / weight)
    return terms


def _autocast(x: Tensor) -> Tensor:
    """In autocast's type where it is on, as the model's own head would be; the loss itself is in float32."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x


def cut(tensor: Tensor | None, n: int | None) -> Tensor | None:
    """The first n outputs of a head's weight or bias."""
    return tensor if tensor is None or n is None or len(tensor) == n else tensor[:n]


def _soft(signal: Signal, weights: Tensor, by: Divergence, weight: float, n: int | None) -> Any:
    if isinstance(signal, TopK):
        return Sparse(topk=signal, row_weights=weights, mode=by.topk_mode, temperature=by.temperature, weight=weight)
    if signal.weight_t is None:
        hidden, head = signal.hidden_t if n is None else signal.hidden_t[:, :n], None
    else:
        hidden, head = signal.hidden_t, cut(signal.weight_t, n)
    return Dense(
        hidden_t=hidden,
        weight_t=head,
        bias_t=cut(signal.bias_t, n),
        head_t=signal.head_t,
        row_weights=weights,
        kind=by.kind,
        temperature=by.temperature,
        beta=by.beta,
        alpha=by.alpha,
        weight=weight,
    )


def _on_logits(rows: HiddenRows, term: Any, n: int | None) -> Tensor:
    """sum_i w_i L_i of one term on logits (N, V) that exist."""
    z = rows.logits()
    z = z if n is None else z[:, :n]
    z = z if z.dtype == torch.float64 else z.float()
    if isinstance(term, CrossEntropy):
        values = F.cross_entropy(z, term.labels, reduction="none")
    elif isinstance(term, Sparse):
        ids = term.topk.ids.long()
        # The finite mask keeps the gradient of an empty rest (k = V) free of NaN.
        rest = z.scatter(-1, ids, torch.finfo(z.dtype).min / 2).logsumexp(-1, keepdim=True)
        outcomes = torch.cat([z.gather(-1, ids), rest], -1)
        values = outcome_divergence(outcomes, term.topk, term.mode, term.temperature)[0] * term.temperature**2
    else:
        t = DenseSignal(term.hidden_t, term.weight_t, term.bias_t, term.head_t).logits().detach().to(z.dtype)
        values = on_logits(z, t, Divergence(term.kind, term.temperature, term.beta, term.alpha))
    return (values * term.row_weights.to(values.dtype)).sum()


def on_logits(z: Tensor, t: Tensor, by: Divergence) -> Tensor:
    """tau^2 D (N,) between logits of the student and of the teacher (N, V)."""
    if by.kind in ("skew", "skew_reverse"):
        skew = "forward" if by.kind == "skew" else "reverse"
        return d.skewed_kl(z, t, by.temperature, alpha=by.alpha, direction=skew, reduction="none")
    if by.kind == "js":
        return d.jensen_shannon(z, t, by.temperature, beta=by.beta, reduction="none")
    function = {"forward": d.forward_kl, "reverse": d.reverse_kl, "total_variation": d.total_variation}[by.kind]
    return function(z, t, by.temperature, reduction="none")

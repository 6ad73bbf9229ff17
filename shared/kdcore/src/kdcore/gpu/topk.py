"""KL divergence to a teacher known by its k most probable outputs.

p = softmax(t), q = softmax(z), K is the teacher's support, P = sum_K p, Q = sum_K q. Three ways to treat what is off K:

    mode          D                                                  dD/dz on K       dD/dz off K
    tail          sum_K p ln(p/q) + (1-P) ln((1-P)/(1-Q))            q - p            q (1 - (1-P)/(1-Q))
    truncated     sum_K p ln(p/q)                                    P q - p          P q
    renormalised  KL(p/P, q/Q) on K                                  q/Q - p/P        0

tail takes all that is off K as one outcome: 0 <= D <= KL(p, q), and what is lost is exactly (1-P) KL(p/(1-P), q/(1-Q))
off K; its gradient is the full one on K and off K differs by 2 (1-P) at most in the sum of absolute values: the error
is that of the mass which the teacher's k outputs leave out. truncated can be negative
and its minimum is not p; renormalised does not see how much the student puts off K. Both are there because others use
them. tau tempers the k + 1 outcomes of tail and truncated, p_i^(1/tau) / sum_j p_j^(1/tau) with the bucket included,
since the teacher's tail is known as one probability only; in renormalised it tempers the k outcomes, which is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import InputError, did_you_mean

MODES = ("tail", "truncated", "renormalised")
NEVER = -1e4  # stands for ln 0: its exponential is 0 and 0 * NEVER is 0, not NaN


@dataclass(frozen=True)
class TopK:
    """The k most probable outputs of rows: ids (..., k) integers, logp (..., k), log_missing (...) = ln(1 - sum p)."""

    ids: Tensor
    logp: Tensor
    log_missing: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, k: int) -> TopK:
        """Of logits (..., V) at temperature 1, in float32 (float64 stays); log_missing is -inf at k = V."""
        if not 1 <= k <= logits.shape[-1]:
            raise InputError(f"k: given {k}, allowed: 1 to the {logits.shape[-1]} outputs")
        logits = _at_least_float32(logits)
        normaliser = logits.logsumexp(-1, keepdim=True)
        values, ids = logits.topk(k, dim=-1)
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1)  # summed directly: 1 - P would cancel
        return cls(ids, values - normaliser, rest - normaliser.squeeze(-1))

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        """`Tensor.to` of all three; a floating type leaves the ids alone."""
        ids = self.ids.to(self.logp.to(*args, **kwargs).device)
        return TopK(ids, self.logp.to(*args, **kwargs), self.log_missing.to(*args, **kwargs))


def topk_kl(
    student_logits: Tensor,
    topk: TopK,
    temperature: float = 1.0,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    scale_by_tau2: bool = True,
) -> Tensor:
    """KL(p, q) over k + 1 outcomes, the teacher's support and one bucket for the rest (module docstring).

    Args:
        student_logits: (..., V). topk: ids and logp (..., k), log_missing (...), as the teacher gave them.
        temperature: tau. The teacher's tail is known as one probability only, so tau acts on the k + 1 outcomes:
            p_i^(1/tau) / sum_j p_j^(1/tau), the bucket included, on both sides. This is the tempered KL at k = V and a
            divergence between the bucketed distributions (>= 0, 0 iff they agree) below it; it is not a bound of the
            tempered full KL.
        weights: (...) row weights; "mean" divides by their sum (0 where it is 0). reduction: "mean", "sum" or "none".
        scale_by_tau2: multiply by tau^2.

    Returns: a scalar, or (...) for "none"; float32, or float64 for float64 logits. The gradient reaches the student
    alone. Raises: InputError on shapes and options.

    >>> p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]), torch.tensor([[0.6, 0.35, 0.03, 0.02]])
    >>> round(topk_kl(q.log(), TopK.from_logits(p.log(), 2)).item(), 6)
    0.139853
    """
    lead = student_logits.shape[:-1]
    if topk.ids.shape[:-1] != lead or topk.logp.shape != topk.ids.shape or topk.log_missing.shape != lead:
        given = f"{tuple(topk.ids.shape)}, {tuple(topk.logp.shape)} and {tuple(topk.log_missing.shape)}"
        raise InputError(
            f"topk: given ids, logp, log_missing of {given}, allowed: (..., k), (..., k) and {tuple(lead)}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: given {temperature}, allowed: a number > 0")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction: given {reduction!r}{did_you_mean(str(reduction), ('mean', 'sum', 'none'))}")
    z = _at_least_float32(student_logits)
    ids = topk.ids.long()
    # ln(1 - Q) from Q would cancel, and a tail wrong by 1e-7 is (1e-7)^(1/tau) at temperature tau: the rest is summed.
    # The finite mask keeps the gradient of an empty rest (k = V) free of NaN.
    rest = z.scatter(-1, ids, torch.finfo(z.dtype).min / 2).logsumexp(-1, keepdim=True)
    rows, _ = outcome_divergence(torch.cat([z.gather(-1, ids), rest], -1), topk, "tail", temperature)
    if scale_by_tau2:
        rows = rows * temperature**2
    w = torch.ones_like(rows) if weights is None else weights.to(rows).expand_as(rows)
    if reduction == "none":
        return rows * w
    total, mass = (rows * w).sum(), w.sum()
    return total if reduction == "sum" else total / torch.where(mass == 0, 1.0, mass)


def outcome_divergence(outcomes: Tensor, topk: TopK, mode: str, temperature: float) -> tuple[Tensor, Tensor]:
    """D (...) of the student's k + 1 outcomes (..., k + 1), and dD/d(outcomes), detached.

    The outcomes are unnormalised log-probabilities at temperature 1: the logits on the support, then the logsumexp of
    the rest. The gradient off the support is the last slope times the softmax of the rest. In mode renormalised the
    last outcome has no part and the last slope is 0.
    """
    missing = topk.log_missing.to(outcomes.dtype).unsqueeze(-1)
    lp = torch.cat([topk.logp.to(outcomes.dtype), missing], -1).detach()
    lq = outcomes
    if mode == "renormalised":
        lq, lp = lq[..., :-1], lp[..., :-1]
    # The first log_softmax also takes back the rounding of a cache in half precision: both sides sum to 1.
    lq, lp = ((x.log_softmax(-1).clamp(min=NEVER) / temperature).log_softmax(-1) for x in (lq, lp))
    p = counted = lp.exp()
    terms = p * (lp - lq)
    if mode == "truncated":
        terms = terms[..., :-1]
        counted = torch.cat([p[..., :-1], torch.zeros_like(missing)], -1)
    slope = (counted.sum(-1, keepdim=True) * lq.detach().exp() - counted) / temperature
    if mode == "renormalised":
        slope = torch.cat([slope, torch.zeros_like(missing)], -1)
    return terms.sum(-1), slope


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

"""Row mathematics of the losses on logits in chunks: every term's D and dD/dy of a few rows (kdcore.gpu._chunks).

y are the logits at temperature 1. The divergences of `DenseRows` are listed in kdcore.gpu.linear_divergence, those of
`SparseRows` in kdcore.gpu.topk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdcore.errors import InputError, did_you_mean
from kdcore.gpu._chunks import MASKED_LOGIT, Block, HeadSpec, Term, finish, logits
from kdcore.gpu.topk import TopK, outcome_divergence

KINDS = ("forward", "reverse", "js", "skew", "skew_reverse", "total_variation")


@dataclass
class CrossEntropyRows(Term):
    """-ln softmax(y)_label; dD/dy = softmax(y) - onehot(label)."""

    labels: Tensor  # (m,) int64
    index: Tensor | None = None

    def __post_init__(self) -> None:
        self.count = len(self.labels)

    def block(self, block: Block, rows: slice, buffer: Tensor | None, weight: Tensor | None) -> Tensor:
        label = self.labels[rows].unsqueeze(1)
        q = block.softmax()
        y = block.y
        divergence = y.amax(1) - y.gather(1, label).squeeze(1) - q.amax(1).log_()
        if weight is not None:
            block.add(q, weight).scatter_add_(1, label, weight.neg().unsqueeze(1))
        return divergence


class Teacher(NamedTuple):
    hidden: Tensor  # (m, d_t)
    weight: Tensor  # (V, d_t)
    bias: Tensor | None  # (V,)
    head: HeadSpec


@dataclass
class DenseRows(Term):
    """Divergence between softmax(y / temperature) and that of a teacher's logits; `mixing` is beta or alpha."""

    teacher: Teacher
    kind: str
    temperature: float
    mixing: float
    index: Tensor | None = None
    buffers = 1

    def __post_init__(self) -> None:
        self.count = len(self.teacher.hidden)

    def load(self, rows: slice, buffer: Tensor) -> None:
        logits(self.teacher.hidden[rows], self.teacher.weight, buffer)

    def block(self, block: Block, rows: slice, buffer: Tensor | None, weight: Tensor | None) -> Tensor:
        assert buffer is not None  # `load` filled it
        bias, t, z = self.teacher.bias, buffer, block.take_logits()
        bias = None if bias is None else bias.to(t.dtype).clamp(min=MASKED_LOGIT)
        finish(t, bias, self.teacher.head, self.temperature, False)
        if self.temperature == 1:
            q = block.take_softmax()
        else:
            q = z.mul_(1 / self.temperature).softmax(1)
        p = t.softmax(1)
        divergence, r = dense_divergence(z, t, p, q, self.kind, self.mixing, weight is not None)
        if weight is None:
            return divergence
        if r is None:
            gradient = q.sub_(p)
        else:
            mean = torch.mul(q, r, out=p).sum(1, keepdim=True)
            gradient = q.mul_(r.sub_(mean))
        block.add(gradient, weight / self.temperature)
        return divergence


def check_divergence(where: str, kind: str, temperature: float, beta: float, alpha: float) -> None:
    """InputError on options of a dense divergence; `where` stands before each name."""
    if kind not in KINDS:
        raise InputError(f"{where}kind: given {kind!r}{did_you_mean(str(kind), KINDS)}")
    check_temperature(where, temperature)
    if kind == "js" and not 0 < beta < 1:
        ends = "JS vanishes at both ends; kind='forward' and 'reverse' are what some libraries call 0 and 1"
        raise InputError(f"{where}beta: given {beta}, allowed: 0 < beta < 1 ({ends})")
    if kind.startswith("skew") and not 0 <= alpha < 1:
        raise InputError(f"{where}alpha: given {alpha}, allowed: 0 <= alpha < 1")


def check_temperature(where: str, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"{where}temperature: given {temperature}, allowed: a number > 0")


def dense_divergence(z, t, p, q, kind: str, mixing: float, want_r: bool) -> tuple[Tensor, Tensor | None]:
    """D (rows,) and r = dD/dq (rows, V), None for forward KL (its gradient is q - p). Overwrites z and t."""
    if kind == "total_variation":
        r = torch.sub(q, p, out=z)
        return r.abs().sum(1) / 2, r.sign_().div_(2)
    lp, lq = _to_log_probabilities(t, p), _to_log_probabilities(z, q)
    if kind == "forward":
        return lp.sub_(lq).mul_(p).sum(1), None
    if kind == "reverse":
        r = lq.sub_(lp)
        return (q * r).sum(1), r
    p_share = 1 - mixing if kind == "skew_reverse" else mixing
    m = torch.lerp(q, p, p_share).clamp_(min=torch.finfo(q.dtype).tiny)
    if kind == "js":
        lm = m.log_()
        r = lq.sub_(lm)
        divergence = mixing * lp.sub_(lm).mul_(p).sum(1) + (1 - mixing) * (q * r).sum(1)
        return divergence, r.mul_(1 - mixing)
    if kind == "skew":
        ratio = torch.div(p, m, out=z)  # ln q is not needed
        return lp.sub_(m.log_()).mul_(p).sum(1), ratio.mul_(mixing - 1)
    ratio = torch.div(q, m, out=t)
    r = lq.sub_(m.log_())
    return (q * r).sum(1), r.sub_(ratio, alpha=mixing) if want_r else None


def _to_log_probabilities(x: Tensor, probability: Tensor) -> Tensor:
    """ln softmax(x) in place, given softmax(x): max x - ln(max softmax) is the log-normaliser without another exp."""
    return x.sub_(x.amax(1, keepdim=True) - probability.amax(1, keepdim=True).log_())


@dataclass
class SparseRows(Term):
    """Divergence to a teacher known by its k most probable outputs; `mode` as in kdcore.gpu.topk."""

    topk: TopK  # (m, k) and (m,)
    mode: str
    temperature: float
    index: Tensor | None = None

    def __post_init__(self) -> None:
        self.count = len(self.topk.ids)

    def block(self, block: Block, rows: slice, buffer: Tensor | None, weight: Tensor | None) -> Tensor:
        topk = TopK(self.topk.ids[rows].long(), self.topk.logp[rows], self.topk.log_missing[rows])
        x = block.take_logits()
        values = x.gather(1, topk.ids)
        off = None
        if self.mode == "renormalised":  # nothing off the support enters, and there the gradient is 0
            rest = values.new_full((len(values), 1), -torch.inf)
        else:
            # The rest is summed by itself: 1 - Q would cancel. So is its gradient, by a softmax of the rest alone.
            x.scatter_(1, topk.ids, torch.finfo(x.dtype).min / 2)
            off = x.softmax(1)
            rest = x.amax(1, keepdim=True) - off.amax(1, keepdim=True).log_()
        divergence, slope = outcome_divergence(torch.cat([values, rest], 1), topk, self.mode, self.temperature)
        if weight is None:
            return divergence
        gradient = x.zero_() if off is None else off.mul_(slope[:, -1:])
        block.add(gradient.scatter_(1, topk.ids, slope[:, :-1]), weight)
        return divergence

"""Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting it into MLPs
(arXiv 2305.10758, 2023).

A graph network's predictions are smooth over the graph, and its differences between neighbours are small. Distilling
node by node transmits the smooth part, in which the differences drown. So the knowledge goes over the edges, the low
and the high frequencies by a term each, into an MLP that sees the features of a node alone.

Nodes i, logits z (student) and t (teacher, of all nodes, computed once in eval mode), log p = log softmax z,
log q = log softmax t, |.| elementwise. E: directed edges of the undirected graph, both directions. E+: E with one self
loop per node. KL(q || p) = sum_c q_c (log q_c - log p_c).

    L_CE   = mean over labelled nodes of -log p_i(y_i)                                                              (1)
    L_low  = 1/|E+| sum_{(i,j) in E+} KL( q_j || p_i )                                                              (2)
    D_ij(z) = softmax_c( |z_i - z_j| / tau ),   L_high = 1/|E| sum_{(i,j) in E} KL( D_ij(t) || D_ij(z) )            (3)
    L      = lambda L_CE + (1 - lambda) (L_low + L_high)                                                            (4)

(2) pulls node i to the mean prediction of its closed neighbourhood, with its degree as weight: its gradient in z_i is
(d_i p_i - sum_j q_j) / |E+|, and its minimum is not 0. (3) sees raw logits: a constant added to one node's logits
changes it. The equations' numbers are this file's.

Teacher: any node classifier, in eval mode at its best validation epoch; no gradient reaches it, and training holds its
logits only. Student: an MLP of the same depth and width, which ships and needs no graph. Full batch, or sampled edges.
`lam: 1` is the MLP on labels alone, `low: node, high: false` is GLNN (arXiv 2110.08727), `high: false` and
`low: none` are the ablations LFD and HFD.

In a loop of your own, `batch = full_batch(x, y, train_nodes, edge_index, teacher_logits)` of kd_graph.engine.edges,
once, then `FFG2M(student).loss(batch).total().backward()` in every step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_graph import runs
from kd_graph.data import load_nodes
from kd_graph.engine.edges import EdgeBatch, chunk_of, full_batch, neighbour_targets
from kd_graph.runs import NodeRun, Run
from kdcore.config import MethodConfig
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError
from kdcore.losses import forward_kl
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage

Low = Literal["neighbours", "node", "none"]


class FFG2MConfig(MethodConfig):
    """The defaults are those of a GCN on Cora."""

    lam: float = Field(0.4, ge=0, le=1, description="lambda, weight of the labels; the distillation gets 1 - lambda")
    tau: float = Field(1.5, gt=0, description="temperature of the differences across an edge")
    low: Low = Field("neighbours", description="low frequency: eq. (2), node-wise KL (GLNN), or none")
    high: bool = Field(True, description="high frequency: eq. (3)")

    @model_validator(mode="after")
    def _learns(self) -> FFG2MConfig:
        if self.lam == 0 and self.low == "none" and not self.high:
            raise ValueError("lam = 0 with low: none and high: false leaves nothing to learn from")
        return self


# ---------------------------------------------------------------- losses


def low_frequency_loss(student_logits: Tensor, teacher_logits: Tensor, edge_index: Tensor) -> Tensor:
    """L_low, eq. (2): mean over the edges (i, j) of KL(softmax t_j || softmax z_i).

    Shapes (n, C), (n, C), edge_index (2, E+) int64 with i in row 0 and j in row 1, self loops included -> scalar, 0
    without edges. Memory O(n C + E). InputError on other shapes.

    >>> z, t = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> round(low_frequency_loss(z, t, torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])).item(), 6)
    0.242001
    """
    _check(student_logits, teacher_logits, edge_index)
    targets = neighbour_targets(teacher_logits, edge_index, student_logits.new_zeros(len(student_logits)))
    return from_targets(student_logits, *targets)


def from_targets(student_logits: Tensor, targets: Tensor, negentropy: Tensor, count: Tensor) -> Tensor:
    """L_low from what `neighbour_targets` sums over the edges: sum_i (negentropy - <targets_i, log p_i>) / count."""
    log_p = _precise(student_logits).log_softmax(1)
    return (negentropy - (targets * log_p).sum()) / count.clamp(min=1)


def high_frequency_loss(
    student_logits: Tensor, teacher_logits: Tensor, edge_index: Tensor, tau: float = 1.5, *, chunk: int | None = None
) -> Tensor:
    """L_high, eq. (3): mean over the edges of KL(D_ij(t) || D_ij(z)), D_ij(z) = softmax(|z_i - z_j| / tau).

    Symmetric in i and j: one direction of every edge gives the same value as both, in half the time. Edges are taken
    in chunks (of 1 MiB, or `chunk` edges) and the gradient is made in the same pass: memory O(n C + chunk C).

    Shapes (n, C), (n, C), edge_index (2, E) int64 without self loops -> scalar, 0 without edges. Differentiable once,
    in the student's logits only. InputError on other shapes or tau <= 0.

    >>> z, t = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    >>> round(high_frequency_loss(z, t, torch.tensor([[0], [1]]), 1.0).item(), 6)
    0.17014
    """
    _check(student_logits, teacher_logits, edge_index)
    if not (tau > 0 and math.isfinite(tau)):
        raise InputError(f"tau = {tau}: must be a finite number above 0")
    z = _precise(student_logits)
    size = chunk or chunk_of(z.shape[1], z.element_size())
    return _DifferencePatterns.apply(z, teacher_logits.detach().to(z.dtype), edge_index, tau, size)


class _DifferencePatterns(torch.autograd.Function):
    """(3) with its gradient g_ij = (D_ij(z) - D_ij(t)) sign(z_i - z_j) / (tau |E|), which is added to z_i, taken from
    z_j. Chunks are (C, edges): a softmax over few classes is vectorised over the edges."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, edge_index: Tensor, tau: float, size: int) -> Tensor:
        total, edges = z.new_zeros(()), edge_index.shape[1]
        gradient = z.new_zeros(z.shape[::-1]) if ctx.needs_input_grad[0] else None
        for lo in range(0, edges, size):
            i, j = edge_index[:, lo : lo + size]
            difference = _across(z, i, j)
            log_s = (difference.abs() / tau).log_softmax(0)
            log_t = (_across(t, i, j).abs_() / tau).log_softmax(0)
            pattern = log_t.exp()
            total += (pattern * log_t.sub_(log_s)).sum()
            if gradient is not None:
                slope = log_s.exp_().sub_(pattern).mul_(difference.sign_())
                gradient.index_add_(1, i, slope)
                gradient.index_add_(1, j, slope, alpha=-1)
        if gradient is not None:
            ctx.save_for_backward(gradient.t().div_(tau * max(1, edges)))
        return total / max(1, edges)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None, None


def _across(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """x_i - x_j of rows (n, C), as (C, edges)."""
    return x.index_select(0, i).sub_(x.index_select(0, j)).t().contiguous()


def node_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """GLNN's term: mean over nodes of KL(softmax t_i || softmax z_i), or a mean with weights (n,)."""
    rows = forward_kl(student_logits, teacher_logits, reduction="none")
    return rows.mean() if weights is None else (weights * rows).sum() / weights.sum().clamp(min=1)


def _precise(logits: Tensor) -> Tensor:
    """Half precision is computed in float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check(student_logits: Tensor, teacher_logits: Tensor, edge_index: Tensor) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape or student_logits.numel() == 0:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise InputError(f"student_logits and teacher_logits: shapes {shapes}; allowed: one shape (n, C), not empty")
    if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.dtype != torch.int64:
        raise InputError(f"edge_index: {edge_index.dtype} {tuple(edge_index.shape)}; allowed: int64 (2, E)")


# ---------------------------------------------------------------- the method


class FFG2M(Distiller):
    """Arguments as in `FFG2MConfig`. `student(x)` maps features (n, F) to logits (n, C)."""

    def __init__(
        self, student: nn.Module, *, lam: float = 0.4, tau: float = 1.5, low: Low = "neighbours", high: bool = True
    ):
        super().__init__()
        if low not in ("neighbours", "node", "none"):
            raise InputError(f"low = {low!r}: allowed: 'neighbours', 'node', 'none'")
        if not 0 <= lam <= 1:
            raise InputError(f"lam = {lam}: allowed: 0 to 1")
        self.student = student
        self.lam, self.tau, self.low, self.high = lam, tau, low, high

    def loss(self, batch: EdgeBatch, player: str = "student") -> LossTerms:
        z, terms, rest = self.student(batch.x), LossTerms(), 1 - self.lam
        if self.lam > 0:  # lambda = 0 reads no label
            terms["ce"] = (self.lam, F.cross_entropy(z[batch.labelled], batch.y[batch.labelled]))
        if rest > 0 and self.low == "neighbours":
            terms["low"] = (rest, from_targets(z, batch.targets, batch.negentropy, batch.count))
        if rest > 0 and self.low == "node":
            terms["node"] = (rest, node_loss(z, batch.teacher, batch.loops))
        if rest > 0 and self.high:
            terms["high"] = (rest, high_frequency_loss(z, batch.teacher, batch.edges, self.tau))
        return terms


def build(config: Run, student: nn.Module) -> FFG2M:
    return FFG2M(student, **config.method_args.model_dump())


def stages(config: Run, context: RunContext) -> list[Stage]:
    data = load_nodes(config.data, config.seed)
    runs.check(config, data)
    return runs.node_stages(config, data, build)


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, and both terms in eval mode on the graph of the training, with the node-wise KL."""
    data = load_nodes(config.data, config.seed)
    result = runs.evaluate(config, artefacts, data=data)
    teacher, student = runs.observed_logits(artefacts, data)
    graph, tau = data.observed, config.method_args.tau
    for role, logits in (("student", student), ("teacher", teacher)):
        low, high = frequency_terms(logits, teacher, graph.edge_index, tau).tolist()
        result |= {f"{role}/l_low": low, f"{role}/l_high": high}
        result[f"{role}/node_kl"] = float(node_loss(logits.double(), teacher.double()))
    return result


@torch.no_grad()
def frequency_terms(student_logits: Tensor, teacher_logits: Tensor, edge_index: Tensor, tau: float) -> Tensor:
    """(L_low, L_high) in float64 of logits (n, C) on edges E (2, E), both directions, without self loops."""
    z, t = student_logits.double(), teacher_logits.double()
    batch = full_batch(z, torch.zeros(len(z)), torch.zeros(0), edge_index, t)
    low = from_targets(z, batch.targets, batch.negentropy, batch.count)
    return torch.stack([low, high_frequency_loss(z, t, batch.edges, tau)])


METHOD = Method("ff_g2m", __doc__, NodeRun[FFG2MConfig], stages, evaluate, runs.predict, runs.write_cache)

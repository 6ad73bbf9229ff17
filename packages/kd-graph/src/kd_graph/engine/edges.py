"""Batches of edges: everything that a loss over neighbours needs, for the whole graph or a sample of its edges.

E are the directed edges of an undirected graph without self loops, both directions present; E+ is E with one self loop
per node. A full batch holds every node once. A sampled one holds B members of E+, drawn uniformly with replacement,
and the nodes at their ends: means over its edges are unbiased, and its memory does not depend on the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdcore.data import seeded_loader
from kdcore.errors import InputError

BLOCKS = 8  # parts of a sampled batch, so that several processes can share it
CHUNK_BYTES = 2**20  # of one (edges, classes) block


class EdgeBatch(NamedTuple):
    """Nodes and edges of one step.

    x: (n, F) features of the batch's nodes. y: (n,) labels, read at `labelled` (m,) alone. teacher: (n, C) logits.
    edges: (2, P) int64 into the nodes; a term that is symmetric needs one direction of each. loops: (n,) float, how
    many self loops of each node are in the batch. targets: (n, C), sum of the teacher's probabilities over the E+
    edges that start at a node. negentropy: (), sum over these edges of sum_c q ln q. count: (), how many they are.
    """

    x: Tensor
    y: Tensor
    labelled: Tensor
    teacher: Tensor
    edges: Tensor
    loops: Tensor
    targets: Tensor
    negentropy: Tensor
    count: Tensor


def chunk_of(classes: int, element_size: int) -> int:
    """Edges whose (edges, classes) block takes CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (classes * element_size))


@torch.no_grad()
def neighbour_targets(teacher: Tensor, edges: Tensor, loops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """targets (n, C), negentropy () and count () of `EdgeBatch`, from directed edges (2, E) and self loops (n,).

    The teacher is fixed, so that sums over edges of what is linear in its probabilities are taken once: a step then
    costs nothing per edge. No (E, C) tensor is made.
    """
    log_q = teacher.to(torch.promote_types(teacher.dtype, torch.float32)).log_softmax(1)
    q = log_q.exp()
    row = (q * log_q).sum(1)
    loops = loops.to(q.dtype)
    targets, size = q * loops.unsqueeze(1), chunk_of(q.shape[1], q.element_size())
    negentropy = (row * loops).sum()
    for lo in range(0, edges.shape[1], size):
        source, target = edges[:, lo : lo + size]
        targets.index_add_(0, source, q.index_select(0, target))
        negentropy += row.index_select(0, target).sum()
    return targets, negentropy, loops.sum() + edges.shape[1]


def full_batch(x: Tensor, y: Tensor, labelled: Tensor, edge_index: Tensor, teacher: Tensor) -> EdgeBatch:
    """The batch of a whole graph.

    x (n, F), y (n,), labelled (m,) nodes whose label may be used, edge_index (2, E) with both directions of every edge
    (self loops in it do not count), teacher logits (n, C). InputError where the edges are not symmetric.
    """
    if len(teacher) != len(x) or len(y) != len(x):
        raise InputError(f"teacher, y: given {len(teacher)} and {len(y)} rows; allowed: {len(x)}, one a node of x")
    edges = edge_index[:, edge_index[0] != edge_index[1]]
    forward = edges[:, edges[0] < edges[1]]
    if 2 * forward.shape[1] != edges.shape[1]:
        backward = edges.shape[1] - forward.shape[1]
        raise InputError(
            f"edge_index: {forward.shape[1]} edges to a later node and {backward} to an earlier one; allowed: both "
            "directions of every edge, as torch_geometric.utils.to_undirected gives them"
        )
    loops = torch.ones(len(x), device=x.device)
    return EdgeBatch(x, y, labelled, teacher, forward, loops, *neighbour_targets(teacher, edges, loops))


class WholeGraph:
    """A loader whose epoch is one batch, kept where it is."""

    def __init__(self, batch: Any):
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self.batch


class EdgeSample(Dataset[Any]):
    """Item k: `size` members of E+ by random number, drawn from the generator that the loader seeds."""

    def __init__(self, edge_index: Tensor, nodes: int, labelled: Tensor, size: int, labels: int, blocks: int):
        self.edge_index, self.nodes, self.labelled = edge_index, nodes, labelled
        self.size, self.labels, self.blocks = size, labels, blocks

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        total = self.edge_index.shape[1] + self.nodes
        chosen = torch.randint(len(self.labelled), (self.labels,)) if self.labels < len(self.labelled) else None
        return torch.randint(total, (self.size,)), self.labelled if chosen is None else self.labelled[chosen]


def edge_loader(
    x: Tensor,
    y: Tensor,
    labelled: Tensor,
    edge_index: Tensor,
    teacher: Tensor,
    *,
    batch_edges: int,
    batch_labels: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Sampled `EdgeBatch`es of `batch_edges` members of E+; an epoch draws as many as E+ has.

    Arguments as in `full_batch`. `batch_labels` nodes of `labelled` (all of them by default up to 256, or their share
    of an epoch) go with each batch. A function of (seed, epoch, index), so that a resumed run sees the same batches.
    """
    if batch_edges < BLOCKS:
        raise InputError(f"batch_edges = {batch_edges}: allowed: {BLOCKS} or more")
    edges = edge_index[:, edge_index[0] != edge_index[1]]
    total = edges.shape[1] + len(x)
    batches = max(1, round(total / batch_edges))
    wanted = batch_labels or max(256, round(len(labelled) * batch_edges / total))
    size = max(1, batch_edges // BLOCKS)
    labels = len(labelled) if wanted >= len(labelled) else max(1, wanted // BLOCKS)
    sample = EdgeSample(edges, len(x), labelled, size, labels, batches * BLOCKS)

    def collate(items: Sequence[tuple[Tensor, Tensor]]) -> EdgeBatch:
        drawn = torch.cat([item[0] for item in items])
        own = items[0][1] if labels == len(labelled) else torch.cat([item[1] for item in items])
        return _sampled(x, y, own, edges, teacher, drawn)

    return seeded_loader(
        sample, BLOCKS, seed=seed, shuffle=False, drop_last=True, num_workers=num_workers, collate=collate
    )


def _sampled(x: Tensor, y: Tensor, labelled: Tensor, edges: Tensor, teacher: Tensor, drawn: Tensor) -> EdgeBatch:
    """The batch of the members `drawn` (B,) of E+: numbers below E are edges, the rest self loops."""
    count = edges.shape[1]
    pairs, loops = edges[:, drawn[drawn < count]], drawn[drawn >= count] - count
    nodes, place = torch.cat([pairs.reshape(-1), loops, labelled]).unique(return_inverse=True)
    pairs, loops, labelled = place.split([pairs.numel(), len(loops), len(labelled)])
    pairs = pairs.view(2, -1)
    own_loops = torch.bincount(loops, minlength=len(nodes)).float()
    logits = teacher[nodes]
    return EdgeBatch(
        x[nodes], y[nodes], labelled, logits, pairs, own_loops, *neighbour_targets(logits, pairs, own_loops)
    )

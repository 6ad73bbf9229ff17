"""Computation trees of message passing: enumeration, exact canonical labels, and the forests they unfold to.

    Tr_0(v) = a node with v's features
    Tr_h(v) = v's features over one child (e_uv, Tr_{h-1}(u)) for every edge u -> v that reaches v

An L-layer network of messages computes a node's embedding from Tr_L(v) alone. The neighbour one came from is among the
children again, so that a tree grows like degree^L; here a tree is never unfolded to be told from another: equal
subtrees are one entry of a table, which makes the label of a node and a depth one dictionary look-up, and the table as
small as the set of different subtrees. Two entries are the same number exactly where the trees are isomorphic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdcore.errors import InputError

if TYPE_CHECKING:
    from torch_geometric.data import Data

MOST_LABELS = 100_000
Canonical = tuple[int, tuple[tuple[int, Any], ...]]
"""A tree written out: (root's label, sorted ((edge label, subtree), ...)); equal exactly for isomorphic trees."""


class TreeTable:
    """Entries (label, children); a child is (edge label, entry). Interning makes equal trees one entry."""

    def __init__(self) -> None:
        self.labels: list[int] = []
        self.children: list[tuple[tuple[int, int], ...]] = []
        self._known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._sizes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def intern(self, label: int, children: Iterable[tuple[int, int]] = ()) -> int:
        """The entry of a tree; the order of the children does not matter."""
        key = (label, tuple(sorted(children)))
        entry = self._known.setdefault(key, len(self.labels))
        if entry == len(self.labels):
            self.labels.append(label)
            self.children.append(key[1])
        return entry

    def size(self, entry: int) -> int:
        """Nodes of the unfolded tree."""
        if entry not in self._sizes:
            self._sizes[entry] = 1 + sum(self.size(child) for _, child in self.children[entry])
        return self._sizes[entry]

    def canonical(self, entry: int) -> Canonical:
        """The tree written out, independent of the numbers of the entries."""
        below = sorted((edge, self.canonical(child)) for edge, child in self.children[entry])
        return self.labels[entry], tuple(below)

    def add(self, tree: Canonical) -> int:
        """The entry of a tree that is written out."""
        return self.intern(tree[0], [(edge, self.add(child)) for edge, child in tree[1]])


def graph_trees(
    table: TreeTable, labels: Sequence[int], edges: Sequence[tuple[int, int]], edge_labels: Sequence[int], hops: int
) -> list[int]:
    """Entries of Tr_hops(v) for every node v, given node labels, directed edges (u, v) and their labels.

    O(hops (n + E log)) look-ups, whatever the size of the trees.
    """
    below: list[list[tuple[int, int]]] = [[] for _ in labels]
    for (u, v), e in zip(edges, edge_labels, strict=True):
        below[v].append((e, u))
    entries = [table.intern(label) for label in labels]
    for _ in range(hops):
        entries = [
            table.intern(label, [(e, entries[u]) for e, u in kids]) for label, kids in zip(labels, below, strict=True)
        ]
    return entries


@dataclass(frozen=True)
class Forest:
    """The disjoint union of trees. label (n,), parent (n,) (-1 at roots), edge (n,) the label of the edge to it."""

    label: np.ndarray
    parent: np.ndarray
    edge: np.ndarray

    @property
    def roots(self) -> np.ndarray:
        return self.parent < 0


def unfold(table: TreeTable, entries: Sequence[int], *, most: int = 1_000_000) -> Forest:
    """The trees of `entries` side by side, nodes in breadth-first order. InputError above `most` nodes."""
    size = sum(table.size(entry) for entry in entries)
    if size > most:
        raise InputError(f"computation trees: {size} nodes in one graph, allowed: {most}; take fewer hops")
    queue = [(entry, -1, 0) for entry in entries]
    position = 0
    while position < len(queue):
        queue.extend((child, position, edge) for edge, child in table.children[queue[position][0]])
        position += 1
    label = np.array([table.labels[entry] for entry, _, _ in queue])
    return Forest(label, np.array([parent for _, parent, _ in queue]), np.array([edge for _, _, edge in queue]))


@dataclass(frozen=True)
class LabelledGraphs:
    """Graphs in integers: what trees are made of, and the features behind the numbers.

    node_rows (labels, F) and edge_rows (labels, F_e) hold the features; F_e is 0 where edges have none.
    """

    labels: list[list[int]]
    edges: list[list[tuple[int, int]]]
    edge_labels: list[list[int]]
    node_rows: Tensor
    edge_rows: Tensor


def discretise(graphs: Sequence[Data], *, decimals: int | None = None, edge_features: bool = True) -> LabelledGraphs:
    """Node and edge features of PyG graphs as integers, rounded to `decimals` first if given.

    A number is the row's place among the sorted different rows, so that it depends on the graphs as a set alone.
    Without `edge_features`, or where a graph has none, all edges have label 0. InputError where rows are too many to be
    discrete.
    """
    node_rows, labels = _numbered([graph.x for graph in graphs], decimals, "node features")
    pairs = [list(map(tuple, graph.edge_index.t().tolist())) for graph in graphs]
    if not edge_features or any(graph.edge_attr is None for graph in graphs):
        return LabelledGraphs(labels, pairs, [[0] * len(pair) for pair in pairs], node_rows, torch.zeros(1, 0))
    edge_rows, edge_labels = _numbered([graph.edge_attr for graph in graphs], decimals, "edge features")
    return LabelledGraphs(labels, pairs, edge_labels, node_rows, edge_rows)


def _numbered(features: Sequence[Tensor], decimals: int | None, field: str) -> tuple[Tensor, list[list[int]]]:
    """(different rows (labels, F), sorted; the number of every row, one list a graph)."""
    every = torch.cat([part.unsqueeze(1) if part.ndim == 1 else part for part in features])
    if decimals is not None:
        every = every.double().round(decimals=decimals).to(every.dtype)
    rows, numbers = every.unique(dim=0, return_inverse=True)
    if len(rows) > MOST_LABELS:
        raise InputError(
            f"{field}: {len(rows)} different rows; computation trees need discrete features, at most {MOST_LABELS}: "
            "give data.round, decimals to round to, or other features"
        )
    return rows, [part.tolist() for part in numbers.split([len(part) for part in features])]

"""What a distilled set of graphs is compared with: choices of equal size that look at no frequency."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kd_graph.engine.distilled import Patterns, graph_bytes, pattern_bytes

if TYPE_CHECKING:
    from torch_geometric.data import Data


def blind_patterns(patterns: Patterns, classes: Mapping[int, Sequence[set[int]]], budget: int, seed: int) -> Patterns:
    """Sets of the same sizes, of trees drawn uniformly from the different ones of the class: as many as there are, or
    as fit in `budget` bytes of `pattern_bytes`, one of each class even where that is beyond it. Frequencies are 1."""
    draw, table = random.Random(seed), patterns.table
    every = {
        label: sorted({t for trees in sets for t in trees if table.children[t]}, key=table.canonical)
        for label, sets in classes.items()
    }
    order = _one_of_each_first(patterns.label, draw)
    drawn = []
    for k in order:
        trees = every[patterns.label[k]]
        drawn.append(tuple(draw.sample(trees, min(len(patterns.sets[k]), len(trees)))))

    def first(count: int) -> Patterns:
        labels = [patterns.label[k] for k in order[:count]]
        return Patterns(table, drawn[:count], labels, [1] * count, patterns.node_rows, patterns.edge_rows)

    return first(_as_many(len(set(patterns.label)), len(order), lambda count: pattern_bytes(first(count)) <= budget))


def random_graphs(graphs: Sequence[Data], budget: int, seed: int, *, edge_features: bool = True) -> list[Data]:
    """Random real graphs within `budget` bytes of `graph_bytes`; one of each class even where that is beyond it."""
    draw = random.Random(seed)
    labels = [int(graph.y) for graph in graphs]
    order = _one_of_each_first(labels, draw)

    def fits(count: int) -> bool:
        return graph_bytes([graphs[k] for k in order[:count]], edge_features=edge_features) <= budget

    kept = [graphs[k].clone() for k in order[: _as_many(len(set(labels)), len(order), fits)]]
    for graph in kept:
        graph.pop("pos", None)
    return kept


def _one_of_each_first(labels: Sequence[int], draw: random.Random) -> list[int]:
    """Positions in random order, one of each class in front."""
    order = list(range(len(labels)))
    draw.shuffle(order)
    firsts = [next(k for k in order if labels[k] == label) for label in sorted(set(labels))]
    return firsts + [k for k in order if k not in firsts]


def _as_many(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest count of low to high that fits, where a smaller one fits whenever a larger one does; low at least."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low

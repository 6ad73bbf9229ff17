"""A distilled data set of graphs: patterns of trees unfolded to PyG graphs, kept on disk without pickles.

    trees.safetensors     the tree dictionary (equal subtrees once) and the closed patterns, in the smallest integers
    graphs.safetensors    the unfolded graphs, collated as PyG's InMemoryDataset does, with their slices

Stock PyG opens the second without anything of ours:

    tensors = safetensors.torch.load_file("graphs.safetensors")
    dataset = InMemoryDataset()
    dataset.slices = {k.removeprefix("slices."): v for k, v in tensors.items() if k.startswith("slices.")}
    dataset._data = Data.from_dict({k: v for k, v in tensors.items() if k in dataset.slices})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kd_graph.engine.itemsets import ItemSet, closed_sets, expand_closed
from kd_graph.engine.trees import TreeTable, discretise, unfold
from kdcore.checkpoint import load_weights
from kdcore.errors import InputError

if TYPE_CHECKING:
    from torch_geometric.data import Data, InMemoryDataset

KEPT = ("x", "edge_index", "edge_attr", "y")


@dataclass(frozen=True)
class Patterns:
    """Sets of trees with their class and how many graphs of the class hold them.

    table: the trees' subtrees; sets: entries of the trees in each set; label, frequency: one a set.
    node_rows (labels, F), edge_rows (labels, F_e): features behind the labels; F_e = 0 without edge features.
    """

    table: TreeTable
    sets: list[tuple[int, ...]]
    label: list[int]
    frequency: list[int]
    node_rows: Tensor
    edge_rows: Tensor

    def __len__(self) -> int:
        return len(self.sets)


def unfold_patterns(patterns: Patterns) -> list[Data]:
    """A graph for each set: its trees side by side, edges from child to parent, `root_mask` true at their roots.

    Trees of one node are left out, and a set without any other gives no graph. `frequency` and `pattern_id` say which
    set it was, in the order of `patterns`. x, edge_attr and y are of the original data's kind.
    """
    from torch_geometric.data import Data

    graphs = []
    for number, (entries, label) in enumerate(zip(patterns.sets, patterns.label, strict=True)):
        entries = [entry for entry in entries if patterns.table.children[entry]]
        if not entries:
            continue
        forest = unfold(patterns.table, entries)
        child = np.flatnonzero(~forest.roots)
        graph = Data(
            x=patterns.node_rows[torch.from_numpy(forest.label)],
            edge_index=torch.from_numpy(np.stack([child, forest.parent[child]])),
            y=torch.tensor([label]),
            root_mask=torch.from_numpy(forest.roots),
            frequency=torch.tensor([patterns.frequency[number]]),
            pattern_id=torch.tensor([number]),
        )
        if patterns.edge_rows.shape[1]:
            graph.edge_attr = patterns.edge_rows[torch.from_numpy(forest.edge[child])]
        graphs.append(graph)
    return graphs


def in_memory(graphs: Sequence[Data]) -> InMemoryDataset:
    """A stock InMemoryDataset of the graphs."""
    from torch_geometric.data import InMemoryDataset

    dataset = InMemoryDataset()
    dataset._data, dataset.slices = InMemoryDataset.collate(list(graphs))
    return dataset


def tensor_bytes(graphs: Sequence[Data]) -> int:
    """Bytes of what a network is trained on: x, edge_index, edge_attr, y and root_mask of every graph, as tensors."""
    names = (*KEPT, "root_mask")
    return _size(graph[k] for graph in graphs for k in names if graph.get(k) is not None)


# ---------------------------------------------------------------- files


def save_graphs(graphs: Sequence[Data], path: Path) -> None:
    """Writes graphs.safetensors."""
    dataset = in_memory(graphs)
    tensors = {name: value for name, value in dataset._data.to_dict().items() if isinstance(value, Tensor)}
    slices = {f"slices.{name}": dataset.slices[name] for name in tensors}
    save_file({name: value.contiguous() for name, value in {**tensors, **slices}.items()}, path)


def load_graphs(path: Path) -> InMemoryDataset:
    """The data set of a graphs.safetensors. InputError on a missing or broken file."""
    from torch_geometric.data import Data, InMemoryDataset

    tensors = load_weights(path)
    slices = {name.removeprefix("slices."): value for name, value in tensors.items() if name.startswith("slices.")}
    lacking = [name for name in ("x", "edge_index", "y") if name not in slices or name not in tensors]
    if lacking:
        raise InputError(f"distilled graphs {path}: '{lacking[0]}' or its slices are missing")
    dataset = InMemoryDataset()
    dataset._data = Data.from_dict({name: tensors[name] for name in slices})
    dataset.slices = slices
    return dataset


def save_patterns(patterns: Patterns, path: Path) -> None:
    """Writes trees.safetensors: of the table only what the sets need, in an order that depends on the trees alone."""
    save_file(_columns(patterns), path)


def pattern_bytes(patterns: Patterns) -> int:
    """Bytes of the arrays of trees.safetensors, without the file's header."""
    return _size(_columns(patterns).values())


def _columns(patterns: Patterns) -> dict[str, Tensor]:
    """The arrays of trees.safetensors. Where a class has every subset of its sets, only its closed sets are written."""
    table, number = TreeTable(), {}
    for tree in sorted({patterns.table.canonical(entry) for entries in patterns.sets for entry in entries}):
        number[tree] = table.add(tree)
    of = {entry: number[patterns.table.canonical(entry)] for entries in patterns.sets for entry in entries}
    classes: dict[int, dict[ItemSet, int]] = {}
    for entries, label, frequency in zip(patterns.sets, patterns.label, patterns.frequency, strict=True):
        classes.setdefault(label, {})[tuple(sorted(of[entry] for entry in entries))] = frequency
    closed = {label: closed_sets(sets) for label, sets in classes.items()}
    whole = all(expand_closed(closed[label]) == _in_order(sets) for label, sets in classes.items())
    rows = [
        (label, items, frequency)
        for label, sets in (closed if whole else classes).items()
        for items, frequency in _in_order(sets).items()
    ]
    flat = [pair for children in table.children for pair in children]
    columns = {
        "tree.label": table.labels,
        "tree.degree": [len(children) for children in table.children],
        "tree.child": [child for _, child in flat],
        "set.closed": [int(whole)],
        "set.label": list(classes),
        "set.count": [sum(label == own for label, _, _ in rows) for own in classes],
        "set.frequency": [frequency for _, _, frequency in rows],
    }
    if patterns.edge_rows.shape[1]:
        columns["tree.edge"] = [edge for edge, _ in flat]
    features = {"node_rows": _features(patterns.node_rows), "edge_rows": _features(patterns.edge_rows)}
    written = {name: small_integers(values) for name, values in columns.items()}
    return {**written, **_members([items for _, items, _ in rows]), **features}


def _members(sets: Sequence[ItemSet]) -> dict[str, Tensor]:
    """Which trees are in which sets, as lists or as a bit of each set for each tree that any of them has: whatever is
    fewer bytes."""
    lists = {
        "set.size": small_integers([len(items) for items in sets]),
        "set.tree": small_integers([entry for items in sets for entry in items]),
    }
    trees = sorted({entry for items in sets for entry in items})
    held = np.array([[tree in items for tree in trees] for items in map(set, sets)], dtype=bool)
    bits = {"set.trees": small_integers(trees), "set.bits": torch.from_numpy(np.packbits(held, axis=1))}
    return min(bits, lists, key=lambda columns: _size(columns.values()))


def _read_members(columns: Mapping[str, Any], bits: np.ndarray | None) -> list[ItemSet]:
    """The counterpart of `_members`."""
    if bits is None:
        trees = iter(columns["set.tree"])
        return [tuple(next(trees) for _ in range(size)) for size in columns["set.size"]]
    trees = columns["set.trees"]
    held = np.unpackbits(bits, axis=1, count=len(trees)).astype(bool)
    return [tuple(tree for tree, own in zip(trees, row, strict=True) if own) for row in held]


def _size(arrays: Iterable[Tensor]) -> int:
    return sum(array.numel() * array.element_size() for array in arrays)


def _in_order(sets: Mapping[ItemSet, int]) -> dict[ItemSet, int]:
    return dict(sorted(sets.items(), key=lambda pair: (-pair[1], pair[0])))


def load_patterns(path: Path) -> Patterns:
    """The patterns of a trees.safetensors, features as float32. InputError on a missing or broken file."""
    tensors = load_weights(path)
    try:
        bits = tensors.get("set.bits")
        columns = {name: value.tolist() for name, value in tensors.items() if "." in name and name != "set.bits"}
        children = columns["tree.child"]
        table, edges = TreeTable(), iter(zip(columns.get("tree.edge", [0] * len(children)), children, strict=True))
        for label, degree in zip(columns["tree.label"], columns["tree.degree"], strict=True):
            table.intern(label, [next(edges) for _ in range(degree)])
        labels = [k for k, n in zip(columns["set.label"], columns["set.count"], strict=True) for _ in range(n)]
        members, classes = _read_members(columns, None if bits is None else bits.numpy()), {}
        for label, items, support in zip(labels, members, columns["set.frequency"], strict=True):
            classes.setdefault(label, {})[items] = support
        rows = tensors["node_rows"].float(), tensors["edge_rows"].float()
        whole = columns["set.closed"] == [1]
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"patterns {path}: not a file of this kind ({error})") from None
    if any(not 0 <= entry < len(table) for sets in classes.values() for entries in sets for entry in entries):
        raise InputError(f"patterns {path}: a set names a tree that is not in the dictionary")
    every = {label: expand_closed(sets) if whole else sets for label, sets in classes.items()}
    found = [(label, items, support) for label, sets in every.items() for items, support in sets.items()]
    labels, sets, supports = (list(column) for column in zip(*found, strict=True))
    return Patterns(table, sets, labels, supports, *rows)


def graph_bytes(graphs: Sequence[Data], *, edge_features: bool = True) -> int:
    """Bytes of real graphs written as compactly: a table of the feature rows, and in the smallest integers the number
    of nodes and edges and the class of every graph, the label of every node, both ends and the label of every edge.
    An undirected edge is written once."""
    found = discretise(graphs, edge_features=edge_features)
    ends, labels = [], []
    for pairs, own in zip(found.edges, found.edge_labels, strict=True):
        undirected = set(pairs) == {(b, a) for a, b in pairs}
        kept = [k for k, (a, b) in enumerate(pairs) if not undirected or a <= b]
        ends.append([end for k in kept for end in pairs[k]])
        labels.append([own[k] for k in kept])
    columns = [
        [len(own) for own in found.labels],
        [len(own) for own in labels],
        [int(graph.y) for graph in graphs],
        [label for own in found.labels for label in own],
        [end for own in ends for end in own],
        *([[label for own in labels for label in own]] if found.edge_rows.shape[1] else []),
    ]
    arrays = [*map(small_integers, columns), _features(found.node_rows), _features(found.edge_rows)]
    return _size(arrays)


def small_integers(values: Sequence[int]) -> Tensor:
    """In the smallest integers that hold the values."""
    most: Any = max(values, default=0)
    kind = next(k for k in (torch.uint8, torch.uint16, torch.uint32, torch.int64) if most <= torch.iinfo(k).max)
    return torch.tensor(values, dtype=torch.int64).to(kind)


def _features(rows: Tensor) -> Tensor:
    """Feature rows as bytes where every value is one of 0 to 255."""
    whole = bool(((rows >= 0) & (rows <= 255) & (rows == rows.round())).all())
    return (rows.to(torch.uint8) if whole else rows).contiguous()

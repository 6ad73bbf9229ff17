"""Node classification data: one graph with training, validation and test nodes, transductive or inductive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from kd_graph import sources
from kdcore.config import Config
from kdcore.errors import InputError

if TYPE_CHECKING:
    from torch_geometric.data import Data

Name = Literal[
    "digits", "npz", "Cora", "CiteSeer", "PubMed", "CS", "Physics", "Computers", "Photo", "ogbn-arxiv", "ogbn-products"
]
MASKS = ("train_mask", "val_mask", "test_mask")


class NodeDataConfig(Config):
    """Which graph, and which of its nodes are labelled, held out and tested."""

    name: Name = Field("digits", description="embedded digits, an npz file, or a data set of PyG or OGB")
    root: str | None = Field(None, description="folder of the data set, or the npz file; $VARIABLES are expanded")
    download: bool = Field(False, description="let PyG download what is missing under root")
    neighbours: int = Field(10, ge=1, le=200, description="digits: nearest neighbours that an image is joined with")
    normalize: bool = Field(False, description="divide each node's features by their sum")
    split: Literal["public", "random"] = Field("public", description="the data set's own masks, or drawn by the seed")
    train_per_class: int = Field(20, ge=1, description="random split: labelled nodes of each class")
    validation: int = Field(500, ge=1, description="random split: validation nodes")
    test: int = Field(1000, ge=1, description="random split: test nodes")
    inductive: float = Field(
        0.0, ge=0, lt=1, description="share of the test nodes that training never sees and that are tested; 0: none"
    )
    observe_rest: bool = Field(
        False, description="inductive: training sees the nodes of no part, too; the published setting leaves them out"
    )

    @property
    def path(self) -> Path:
        """`root` as a path, environment variables expanded."""
        if self.root is None:
            raise InputError(f"data.root: required for data.name = '{self.name}'")
        return sources.expanded(self.root, "data.root")


@dataclass(frozen=True)
class NodeData:
    """A graph and what training may see of it.

    graph: x (n, F) float32, edge_index (2, E) int64 undirected (both directions) without self loops, y (n,) int64, and
    boolean train_mask, val_mask, test_mask (n,). observed: the graph that teacher and student are trained on, the same
    one, or in the inductive setting the part induced by all nodes but the hidden ones. test: nodes (m,) of `graph`
    that are tested, the hidden ones in the inductive setting.
    """

    graph: Data
    observed: Data
    test: Tensor
    class_names: list[str]
    config: NodeDataConfig

    @property
    def num_features(self) -> int:
        return self.graph.x.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_nodes(config: NodeDataConfig, seed: int = 0) -> NodeData:
    """Reads and splits a graph. Raises InputError that names the field or the file."""
    return prepare_nodes(_read(config), config, seed)


def prepare_nodes(graph: Data, config: NodeDataConfig, seed: int = 0) -> NodeData:
    """A PyG graph with x, edge_index and y as `NodeData`: undirected, without self loops, split."""
    from torch_geometric.utils import remove_self_loops, to_undirected

    graph = graph.clone()
    edges, _ = remove_self_loops(graph.edge_index)
    graph.edge_index = to_undirected(edges, num_nodes=graph.num_nodes)  # also merges double edges
    if config.normalize:
        total = graph.x.sum(1, keepdim=True)
        graph.x = graph.x / total.masked_fill(total == 0, 1)
    classes = int(graph.y.max()) + 1
    _split(graph, config, seed, classes)
    _check(graph)
    test = graph.test_mask.nonzero().squeeze(1)
    if not config.inductive:
        return NodeData(graph, graph, test, [str(c) for c in range(classes)], config)
    order = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))]
    hidden = order[: max(1, int(len(test) * config.inductive))].sort().values
    seen = torch.ones(graph.num_nodes, dtype=torch.bool)
    seen[hidden] = False
    if not config.observe_rest:
        seen &= graph.train_mask | graph.val_mask | graph.test_mask
    return NodeData(graph, graph.subgraph(seen), hidden, [str(c) for c in range(classes)], config)


def _read(config: NodeDataConfig) -> Data:
    if config.name == "digits":
        return sources.digits_graph(config.neighbours)
    if config.name == "npz":
        return sources.npz_graph(config.path)
    return sources.library_graph(config.name, config.path, download=config.download)


def _split(graph: Data, config: NodeDataConfig, seed: int, classes: int) -> None:
    """Sets the masks of a random split, or sees to it that the graph has its own."""
    if config.split == "public":
        lacking = [name for name in MASKS if name not in graph]
        if lacking:
            raise InputError(f"data.split = 'public': '{config.name}' has no {lacking[0]}; give data.split: random")
        return
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Tensor] = {}
    chosen = []
    for label in range(classes):
        nodes = (graph.y == label).nonzero().squeeze(1)
        if len(nodes) < config.train_per_class:
            raise InputError(f"data.train_per_class = {config.train_per_class}: class {label} has {len(nodes)} nodes")
        chosen.append(nodes[torch.randperm(len(nodes), generator=generator)[: config.train_per_class]])
    parts["train_mask"] = torch.cat(chosen)
    free = (graph.y >= 0).index_fill(0, parts["train_mask"], False).nonzero().squeeze(1)
    if len(free) < config.validation + config.test:
        wanted = f"data.validation + data.test = {config.validation + config.test}"
        raise InputError(f"{wanted}: {len(free)} labelled nodes are left after the training nodes")
    free = free[torch.randperm(len(free), generator=generator)]
    parts["val_mask"] = free[: config.validation]
    parts["test_mask"] = free[config.validation : config.validation + config.test]
    for name in MASKS:
        graph[name] = torch.zeros(graph.num_nodes, dtype=torch.bool).index_fill(0, parts[name], True)


def _check(graph: Data) -> None:
    for name in MASKS:
        mask = graph[name]
        if mask.ndim != 1 or len(mask) != graph.num_nodes:
            raise InputError(f"data: {name} has shape {tuple(mask.shape)} for {graph.num_nodes} nodes; allowed: (n,)")
        if not bool(mask.any()):
            raise InputError(f"data: {name} has no node")
        if int(graph.y[mask].min()) < 0:
            raise InputError(f"data: a node of {name} has no label")
    if bool((graph.train_mask & graph.test_mask).any()):
        raise InputError("data: a training node is a test node, too")
    if not bool(torch.isfinite(graph.x).all()):
        raise InputError("data: a node's features are not finite")

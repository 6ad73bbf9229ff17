"""Graph classification data: lists of PyG graphs for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from kd_graph import sources
from kdcore.config import Config
from kdcore.errors import InputError

if TYPE_CHECKING:
    from torch_geometric.data import Data

OGB_GRAPHS = ("ogbg-molbace", "ogbg-molbbbp", "ogbg-molhiv")


class GraphDataConfig(Config):
    """Which graphs, what their features are, and how they are split."""

    name: str = Field("digits", description=f"embedded digits, a TUDataset by its name, or {', '.join(OGB_GRAPHS)}")
    root: str | None = Field(None, description="folder of the data set; $VARIABLES are expanded")
    download: bool = Field(False, description="let PyG download what is missing under root")
    classes: list[int] | None = Field(None, description="keep these classes alone, numbered from 0 in this order")
    levels: int = Field(3, ge=1, le=16, description="digits: steps of ink that a node's features tell apart")
    threshold: float = Field(0.25, ge=0, lt=1, description="digits: ink below which a pixel is paper")
    degree_features: int = Field(64, ge=1, description="graphs without node features: one-hot degree, up to this one")
    edge_features: bool = Field(True, description="whether edges keep their features, where they have any")
    round: int | None = Field(None, ge=0, description="decimals that features are rounded to")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the graphs of each class held out for validation")
    test: float = Field(0.1, gt=0, lt=1, description="share of the graphs of each class that are tested")
    split_seed: int | None = Field(None, ge=0, description="seed of the split; None: the run's, a new split each")

    @property
    def path(self) -> Path:
        """`root` as a path, environment variables expanded."""
        if self.root is None:
            raise InputError(f"data.root: required for data.name = '{self.name}'")
        return sources.expanded(self.root, "data.root")


@dataclass(frozen=True)
class GraphData:
    """Graphs with x (n, F) float32, edge_index (2, E) int64, y (1,) int64, and edge_attr (E, F_e) float32 or none."""

    train: list[Data]
    validation: list[Data]
    test: list[Data]
    class_names: list[str]
    config: GraphDataConfig

    @property
    def num_features(self) -> int:
        return self.train[0].x.shape[1]

    @property
    def num_edge_features(self) -> int:
        attributes = self.train[0].edge_attr
        return 0 if attributes is None else attributes.shape[1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_graphs(config: GraphDataConfig, seed: int = 0) -> GraphData:
    """Reads and splits a set of graphs. Raises InputError that names the field or the file."""
    split = None
    if config.name == "digits":
        graphs, names = sources.digit_graphs(config.levels, config.threshold)
    elif config.name in OGB_GRAPHS:
        graphs, names, split = sources.ogb_graphs(config.name, config.path)
    elif config.name.startswith("ogbg"):
        raise InputError(f"data.name = '{config.name}': allowed: digits, a TUDataset, {', '.join(OGB_GRAPHS)}")
    else:
        graphs, names = sources.tu_graphs(
            config.name, config.path, download=config.download, degree_features=config.degree_features
        )
    graphs = _prepared(graphs, config, len(names))
    names = names if config.classes is None else [names[c] for c in config.classes]
    if split is not None and config.classes is None:
        parts = [split[part].tolist() for part in ("train", "valid", "test")]
    else:
        labels = torch.cat([graph.y for graph in graphs])
        parts = stratified(labels, config, seed if config.split_seed is None else config.split_seed)
    return GraphData(*([graphs[i] for i in part] for part in parts), names, config)


def _prepared(graphs: Sequence[Data], config: GraphDataConfig, classes: int) -> list[Data]:
    """The graphs of the wanted classes with what training uses and nothing else."""
    from torch_geometric.data import Data

    wanted = list(range(classes)) if config.classes is None else config.classes
    if len(set(wanted)) != len(wanted) or len(wanted) < 2 or not set(wanted) <= set(range(classes)):
        raise InputError(f"data.classes = {wanted}: allowed: two or more different ones of 0 to {classes - 1}")
    number = {label: k for k, label in enumerate(wanted)}
    kept = []
    for graph in graphs:
        label = int(graph.y)
        if label not in number or graph.num_nodes == 0:
            continue
        own = Data(x=graph.x.float(), edge_index=graph.edge_index, y=torch.tensor([number[label]]))
        if config.round is not None:
            own.x = own.x.round(decimals=config.round)
        if config.edge_features and graph.edge_attr is not None:
            own.edge_attr = graph.edge_attr.float().view(graph.num_edges, -1)
        if graph.get("pos") is not None:
            own.pos = graph.pos
        kept.append(own)
    return kept


def stratified(labels: Tensor, config: GraphDataConfig, seed: int) -> list[list[int]]:
    """Training, validation and test numbers with the same share of every class, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[int]] = [[], [], []]
    if config.validation + config.test >= 1:
        raise InputError(f"data.validation + data.test = {config.validation + config.test}: allowed: below 1")
    for label in range(int(labels.max()) + 1):
        own = (labels == label).nonzero().squeeze(1)
        if len(own) < 3:
            raise InputError(f"data: class {label} has {len(own)} graphs; a split needs 3 or more")
        own = own[torch.randperm(len(own), generator=generator)].tolist()
        held, tested = (max(1, round(share * len(own))) for share in (config.validation, config.test))
        for part, members in zip(parts, (own[held + tested :], own[:held], own[held : held + tested]), strict=True):
            part.extend(members)
    return [sorted(part) for part in parts]

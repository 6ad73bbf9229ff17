"""Where graphs come from: embedded digits, an npz file of one's own, PyG's and OGB's data sets.

PyG's classes read the raw files where they lie; what they process goes to `KD_CACHE`, so that a data folder may be
read-only. Planetoid's raw files are pickles, which PyG opens as such: take them from a source you trust.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcore.errors import InputError
from kdcore.stages import cache_folder, digest

if TYPE_CHECKING:
    from torch_geometric.data import Data, Dataset

PLANETOID = ("Cora", "CiteSeer", "PubMed")
COAUTHOR = ("CS", "Physics")
AMAZON = ("Computers", "Photo")
OGB_NODES = ("ogbn-arxiv", "ogbn-products")


def expanded(path: str, field: str) -> Path:
    """A path of a config with its environment variables; InputError that names the field when one is not set."""
    text = os.path.expandvars(path)
    if "$" in text:
        raise InputError(f"{field} = '{path}': its environment variable is not set")
    return Path(text).expanduser()


def read_dataset(kind: Any, root: Path, name: str, *, download: bool, **options: Any) -> Dataset:
    """`kind(root, name)`, a data set class of PyG, with its processed files under `KD_CACHE`.

    Raises InputError that names the raw file which is missing (unless `download`) or broken.
    """

    class Located(kind):
        @property
        def processed_dir(self) -> str:
            files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self._raw() if path]
            return str(cache_folder() / "datasets" / f"{name}-{digest([files, sorted(options.items())])}")

        def _raw(self) -> list[str]:
            return [path for path in self.raw_paths if os.path.isfile(path)]

        def _download(self) -> None:
            missing = [path for path in self.raw_paths if not os.path.isfile(path)]
            if missing and not download:
                raise InputError(
                    f"data.root = {root}: {name} lacks {Path(missing[0]).relative_to(root)}; "
                    "give the folder that holds it, or data.download: true"
                )
            super()._download()

    Located.__name__ = kind.__name__
    try:
        return Located(str(root), name, **options)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, IndexError) as error:
        raise InputError(f"data.root = {root}: PyG cannot read {name} there ({error})") from None


# ---------------------------------------------------------------- one graph, labelled nodes


def digits_graph(neighbours: int) -> Data:
    """scikit-learn's 1797 digits, each joined with its nearest ones by Euclidean distance: x (1797, 64) in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph
    from torch_geometric.data import Data

    bunch = load_digits()
    rows, columns = kneighbors_graph(bunch.data, neighbours).nonzero()
    edge_index = torch.from_numpy(np.stack([rows, columns]).astype(np.int64))
    return Data(x=torch.from_numpy(bunch.data).float() / 16, edge_index=edge_index, y=torch.from_numpy(bunch.target))


def npz_graph(path: Path) -> Data:
    """A graph of one's own: x (n, F), edge_index (2, E), y (n,) with -1 where unknown, optionally train_mask, val_mask
    and test_mask (n,), in an npz file without pickles."""
    from torch_geometric.data import Data

    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise InputError(f"data.root = {path}: not a readable npz file ({error})") from None
    missing = [name for name in ("x", "edge_index", "y") if name not in found]
    if missing:
        raise InputError(f"data.root = {path}: array '{missing[0]}' is missing; it has {', '.join(found) or 'none'}")
    n = len(found["x"])
    masks = {name: found[name] for name in ("train_mask", "val_mask", "test_mask") if name in found}
    shapes = {"x": 2, "y": 1, "edge_index": 2, **dict.fromkeys(masks, 1)}
    for name, rank in shapes.items():
        value = found[name]
        if value.ndim != rank or (name != "edge_index" and len(value) != n):
            raise InputError(
                f"data.root = {path}: '{name}' has shape {tuple(value.shape)}, x {tuple(found['x'].shape)}"
            )
    if len(found["edge_index"]) != 2:
        raise InputError(
            f"data.root = {path}: 'edge_index' has shape {tuple(found['edge_index'].shape)}; allowed: (2, E)"
        )
    edges = found["edge_index"].long()
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= n):
        raise InputError(f"data.root = {path}: 'edge_index' names nodes {int(edges.min())}..{int(edges.max())} of {n}")
    return Data(
        x=found["x"].float(),
        edge_index=edges,
        y=found["y"].long(),
        **{name: mask.bool() for name, mask in masks.items()},
    )


def library_graph(name: str, root: Path, *, download: bool) -> Data:
    """The graph of a data set that PyG or OGB reads. InputError where it is not there."""
    from torch_geometric import datasets

    if name in OGB_NODES:
        return _ogb_nodes(name, root)
    kinds = {PLANETOID: datasets.Planetoid, COAUTHOR: datasets.Coauthor, AMAZON: datasets.Amazon}
    kind = next(kind for names, kind in kinds.items() if name in names)
    return read_dataset(kind, root, name, download=download)[0]


def _ogb_nodes(name: str, root: Path) -> Data:
    dataset = _ogb("ogb.nodeproppred", "PygNodePropPredDataset", name, root)
    graph, split = dataset[0], dataset.get_idx_split()
    graph.y = graph.y.view(-1)
    for part, key in (("train_mask", "train"), ("val_mask", "valid"), ("test_mask", "test")):
        graph[part] = torch.zeros(len(graph.y), dtype=torch.bool)
        graph[part][split[key]] = True
    return graph


def _ogb(module: str, kind: str, name: str, root: Path) -> Any:
    import importlib

    try:
        reader = getattr(importlib.import_module(module), kind)
    except ImportError:
        raise InputError(f"data.name = '{name}': needs the package ogb, which is not installed") from None
    return reader(name, root=str(root))  # downloads what is missing, as its users expect


# ---------------------------------------------------------------- many graphs, one label each


def digit_graphs(levels: int, threshold: float) -> tuple[list[Data], list[str]]:
    """scikit-learn's digits as graphs: a node for each inked pixel, joined with its inked neighbours above, below and
    beside; x is the ink one-hot in `levels` steps. `threshold` in [0, 1) is the ink below which a pixel is paper."""
    from sklearn.datasets import load_digits
    from torch_geometric.data import Data

    bunch = load_digits()
    graphs = []
    for image, label in zip(bunch.images / 16, bunch.target):
        inked = image > threshold
        number = np.full(image.shape, -1)
        number[inked] = np.arange(inked.sum())
        beside = np.stack([number[:, :-1].ravel(), number[:, 1:].ravel()])
        below = np.stack([number[:-1].ravel(), number[1:].ravel()])
        pairs = [two[:, (two >= 0).all(0)] for two in (beside, below)]
        one_way = torch.from_numpy(np.concatenate(pairs, axis=1).astype(np.int64))
        share = (image[inked] - threshold) / (1 - threshold)
        level = torch.from_numpy(np.minimum((share * levels).astype(np.int64), levels - 1))
        x = torch.nn.functional.one_hot(level, levels).float()
        edges = torch.cat([one_way, one_way.flip(0)], dim=1)
        rows, columns = np.nonzero(inked)
        position = torch.from_numpy(np.stack([columns, -rows], axis=1)).float()
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([int(label)]), pos=position))
    return graphs, [str(name) for name in bunch.target_names]


def tu_graphs(name: str, root: Path, *, download: bool, degree_features: int) -> tuple[list[Data], list[str]]:
    """A TUDataset by name. Graphs without node labels get their degree one-hot, up to `degree_features`."""
    from torch_geometric.datasets import TUDataset
    from torch_geometric.utils import degree

    dataset = read_dataset(TUDataset, root, name, download=download)
    graphs = list(dataset)
    for graph in graphs:
        if graph.x is None or graph.x.shape[1] == 0:
            found = degree(graph.edge_index[0], graph.num_nodes).long().clamp(max=degree_features)
            graph.x = torch.nn.functional.one_hot(found, degree_features + 1).float()
    return graphs, [str(label) for label in range(dataset.num_classes)]


def ogb_graphs(name: str, root: Path) -> tuple[list[Data], list[str], dict[str, torch.Tensor]]:
    """An ogbg-mol data set of one binary label with OGB's own scaffold split."""
    dataset = _ogb("ogb.graphproppred", "PygGraphPropPredDataset", name, root)
    graphs = []
    for graph in dataset:
        graph.x, graph.y = graph.x.float(), graph.y.view(-1)[:1].long()
        graph.edge_attr = graph.edge_attr.float()
        graphs.append(graph)
    return graphs, ["0", "1"], dataset.get_idx_split()

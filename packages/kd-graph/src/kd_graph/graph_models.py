"""Classifiers of graphs: a network of `torch_geometric.nn.models`, a readout, a linear head.

A saved one is a folder with `model.safetensors` (`body.*` are PyG's own names, `head.*` a torch Linear) and
`config.json` with PyG's class and arguments.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_graph.models import ModelConfig, build_network, load_into
from kdcore.errors import InputError

Pool = Literal["mean", "add", "max"]


class GraphModelConfig(ModelConfig):
    """A network of PyG with a readout over the nodes that count: the roots of a distilled graph, all of another."""

    pool: Pool = Field("mean", description="readout; add is the sum")


def root_pool(h: Tensor, batch: Tensor, root_mask: Tensor | None = None, *, pool: Pool = "mean") -> Tensor:
    """Embeddings h (n, D) -> one vector a graph (B, D), over the roots alone where there is a mask (n,)."""
    from torch_geometric.nn import global_add_pool, global_max_pool, global_mean_pool

    size = int(batch.max()) + 1
    if root_mask is not None:
        h, batch = h[root_mask], batch[root_mask]
    return {"mean": global_mean_pool, "add": global_add_pool, "max": global_max_pool}[pool](h, batch, size)


class GraphClassifier(nn.Module):
    """body(x, edge_index) -> (n, D), root_pool, head: (B, K). Edge features go to bodies that take them."""

    def __init__(self, body: nn.Module, head: nn.Linear, *, pool: Pool = "mean"):
        super().__init__()
        self.body, self.head, self.pool = body, head, pool
        self.takes_edges = "edge_index" in inspect.signature(body.forward).parameters
        own = getattr(body, "kd_args", {"edge_dim": None})  # a body of one's own takes what it says it supports
        self.takes_edge_attr = bool(getattr(body, "supports_edge_attr", False)) and "edge_dim" in own

    def embed(self, data: Any) -> Tensor:
        """(n, D) of a Data or Batch."""
        if not self.takes_edges:
            return self.body(data.x)
        if self.takes_edge_attr and data.edge_attr is not None:
            return self.body(data.x, data.edge_index, edge_attr=data.edge_attr)
        return self.body(data.x, data.edge_index)

    def forward(self, data: Any) -> Tensor:
        batch = data.batch if data.batch is not None else data.edge_index.new_zeros(data.num_nodes)
        return self.head(root_pool(self.embed(data), batch, data.get("root_mask"), pool=self.pool))


def create_classifier(
    config: GraphModelConfig, in_channels: int, classes: int, *, edge_channels: int = 0, field: str = "student"
) -> GraphClassifier:
    """The classifier of a config. InputError names `field` and what is wrong with it."""
    if config.checkpoint is not None:
        network = load_classifier(Path(config.checkpoint), field=field)
        if (network.body.in_channels, network.head.out_features) != (in_channels, classes):
            raise InputError(f"{field}.checkpoint: of other features or classes than the data's")
        return network
    if config.self_loops:
        raise InputError(f"{field}.self_loops: allowed for node classification alone")
    args = dict(config.args)
    width = args.get("hidden_channels")
    if not isinstance(width, int):
        raise InputError(f"{field}.args.hidden_channels = {width!r}: required, an integer")
    if config.name == "GAT" and edge_channels:
        args["edge_dim"] = edge_channels
    body = build_network(config.name, {"in_channels": in_channels, **_outputs(config.name, width), **args}, field)
    return GraphClassifier(body, nn.Linear(width, classes), pool=config.pool)


def _outputs(name: str, width: int) -> dict[str, int]:
    """An MLP names its output width; a BasicGNN without one ends with its hidden width and an activation."""
    return {"out_channels": width} if name == "MLP" else {}


def save_classifier(network: GraphClassifier, folder: Path, *, class_names: Sequence[str]) -> None:
    """Writes model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    content = {
        "library": "torch_geometric.nn.models",
        "class": type(network.body).__name__,
        "args": network.body.kd_args,
        "pool": network.pool,
        "class_names": list(class_names),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path, *, field: str = "model") -> GraphClassifier:
    """A classifier that `save_classifier` wrote, in eval mode. InputError on a broken folder."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, args, pool, classes = (content[key] for key in ("class", "args", "pool", "class_names"))
        width = args["hidden_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{field}: {path} is missing or broken ({error})") from None
    network = GraphClassifier(build_network(name, args, field), nn.Linear(width, len(classes)), pool=pool)
    load_into(network, folder / "model.safetensors", field)
    return network.eval()


@torch.no_grad()
def classify(network: GraphClassifier, graphs: Sequence[Any], *, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """(logits (N, K), labels (N,)) of graphs in their order, on the CPU."""
    from torch_geometric.data import Batch

    device, training = next(network.parameters()).device, network.training
    network.eval()
    logits = []
    for lo in range(0, len(graphs), batch_size):
        batch = Batch.from_data_list(list(graphs[lo : lo + batch_size]), exclude_keys=["pos"])
        logits.append(network(batch.to(device)).float().cpu())
    network.train(training)
    return torch.cat(logits), torch.cat([graph.y for graph in graphs])

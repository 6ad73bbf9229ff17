"""Networks of `torch_geometric.nn.models` by name, saved so that stock PyG opens them.

A saved network is a folder with `model.safetensors` and `config.json` (class, arguments, class names):

    config = json.load(open("runs/x/student/config.json"))
    network = getattr(torch_geometric.nn.models, config["class"])(**config["args"])
    network.load_state_dict(safetensors.torch.load_file("runs/x/student/model.safetensors"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcore.checkpoint import load_weights
from kdcore.config import Config
from kdcore.errors import InputError, did_you_mean

MODELS = ("MLP", "GCN", "GraphSAGE", "GAT", "GIN", "PNA", "EdgeCNN")
"""Classes of torch_geometric.nn.models that map features and edges to outputs of every node."""


class ModelConfig(Config):
    """A network of torch_geometric.nn.models; the widths of input and output come from the data."""

    name: str = Field(description=f"class of torch_geometric.nn.models: {', '.join(MODELS)}")
    args: dict[str, Any] = Field(
        default_factory=dict, description="its arguments: hidden_channels, num_layers, dropout, norm, heads, ..."
    )
    checkpoint: str | None = Field(None, description="start from a saved folder, or from a .safetensors file")
    self_loops: bool = Field(False, description="give it the graph with a self loop on every node")


class OnGraph(nn.Module):
    """A network behind one call for all kinds: an MLP gets the features alone, `self_loops` are added on the way."""

    def __init__(self, network: nn.Module, *, self_loops: bool = False):
        super().__init__()
        self.network, self.self_loops = network, self_loops
        self.takes_edges = type(network).__name__ != "MLP"

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        if not self.takes_edges:
            return self.network(x)
        if self.self_loops:
            loops = torch.arange(len(x), device=x.device).expand(2, -1)
            edge_index = torch.cat([edge_index, loops], dim=1)
        return self.network(x, edge_index)


def create_model(config: ModelConfig, in_channels: int, out_channels: int, *, field: str) -> nn.Module:
    """The network of a config. InputError names `field` and what is wrong with it."""
    if config.checkpoint is not None and Path(config.checkpoint).is_dir():
        network, _ = load_model(Path(config.checkpoint), field=field)
        _check_widths(network, in_channels, out_channels, field)
        return network
    network = build_network(
        config.name, {"in_channels": in_channels, "out_channels": out_channels, **config.args}, field
    )
    if config.checkpoint is not None:
        load_into(network, Path(config.checkpoint), field)
    return network


def build_network(name: str, args: Mapping[str, Any], field: str) -> nn.Module:
    from torch_geometric.nn import models

    if name not in MODELS:
        raise InputError(
            f"{field}.name = '{name}': not a network of PyG that is known here{did_you_mean(name, MODELS)}"
        )
    args = dict(args)
    if isinstance(args.get("dropout"), int):
        args["dropout"] = float(args["dropout"])  # MLP takes an integer for a list
    try:
        network = getattr(models, name)(**args)
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        raise InputError(f"{field}.args = {args}: PyG refuses them for {name} ({error})") from None
    network.kd_args = args
    return network


def _check_widths(network: nn.Module, in_channels: int, out_channels: int, field: str) -> None:
    found = (network.in_channels, network.out_channels)
    if found != (in_channels, out_channels):
        raise InputError(
            f"{field}.checkpoint: takes {found[0]} features and gives {found[1]} outputs; "
            f"the data has {in_channels} and {out_channels}"
        )


def load_into(network: nn.Module, path: Path, field: str) -> None:
    state = load_weights(path)
    own = network.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own or own[name].shape != state[name].shape:
            raise InputError(f"{field}.checkpoint = {path}: weights of another network ('{name}' does not fit)")
    network.load_state_dict(state)


def save_model(network: nn.Module, folder: Path, *, class_names: Sequence[str], self_loops: bool = False) -> None:
    """Writes model.safetensors and config.json for a network that `create_model` or `load_model` made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    content = {
        "library": "torch_geometric.nn.models",
        "class": type(network).__name__,
        "args": network.kd_args,
        "self_loops": self_loops,
        "class_names": list(class_names),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path, *, field: str = "model") -> tuple[nn.Module, dict[str, Any]]:
    """(the network, what its config.json says) of a folder that `save_model` wrote. InputError on a broken one."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, args = content["class"], dict(content["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{field}: {path} is missing or broken ({error})") from None
    network = build_network(name, args, field)
    load_into(network, folder / "model.safetensors", field)
    return network.eval(), content


def load_on_graph(folder: Path, *, field: str = "model") -> OnGraph:
    """A saved network behind the call (x, edge_index)."""
    network, content = load_model(folder, field=field)
    return OnGraph(network, self_loops=bool(content.get("self_loops"))).eval()


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

"""FSDP: weights and optimiser states are shards (DTensor); checkpoints and what is deployed hold whole tensors.

A checkpoint therefore looks the same with and without FSDP. Gathering is collective: every process calls. What has run
is FSDP2 on two CPU processes (gloo); on accelerators the same code has not run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kdcore.distiller import Distiller
from kdcore.errors import InputError


def check_sharding(accelerator: Accelerator, distiller: Distiller) -> None:
    """Raises InputError for what FSDP cannot train: it computes the gradients of all parameters together."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise InputError("accelerate launch: FSDP version 1 is not supported, allowed: --fsdp_version 2, or DDP")
    players = distiller.players()
    if len(players) > 1:
        raise InputError(f"FSDP: {type(distiller).__name__} has {len(players)} players, allowed: one; use DDP")
    if distiller.gradient_rule(players[0].name) is not None:
        raise InputError(f"FSDP: {type(distiller).__name__} combines per-term gradients, not supported; use DDP")


def gathered(value: Any) -> Any:
    """`value` (tensors in dicts and lists) with whole tensors on the CPU in place of shards."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item) for item in value)
    return value


def scattered(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors sharded as the tensor of the same name in `like`; the others as they are."""
    return {name: _shard(value, like.get(name)) for name, value in values.items()}


def scattered_optimizer(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimiser's state dict whose tensors of a parameter's shape are sharded as that parameter."""
    slots = {
        index: {name: _shard(value, parameters[index]) for name, value in slot.items()}
        for index, slot in state["state"].items()
    }
    return {**state, "state": slots}


def _shard(value: Any, like: Tensor | None) -> Any:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of `model` can be called on their own: their weights are whole on every process."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def make_whole(module: nn.Module) -> None:
    """Replaces shards by whole parameters for good, at the end of training."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                part._parameters[name] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)

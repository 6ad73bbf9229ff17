"""Gradient checkpointing whose second forward pass sees the network as the first one did.

A network's adapters and attention processors are switched from outside: the teacher is the fake score without its
adapters, and a negative prompt is there inside a `with` block. The backward pass comes later, when the switches may
stand elsewhere. So a block that is computed again gets back, for as long as it runs, what it had the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from kdcore.errors import InputError

ADAPTER = ("_disable_adapters", "_active_adapter")  # the switches of peft's layers
Switches = list[tuple[nn.Module, dict[str, Any]]]


def enable_checkpointing(network: nn.Module) -> None:
    """Has a diffusers model compute its blocks again in the backward pass. InputError where it cannot."""
    try:
        network.enable_gradient_checkpointing(recomputed)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        name = type(network).__name__
        raise InputError(f"method_args.gradient_checkpointing: {name} cannot ({error}); give false") from None


def recomputed(block: nn.Module, *args: Any) -> Any:
    """block(*args), whose activations are computed again for its gradient."""
    switches = switches_of(block)

    def run(*args: Any) -> Any:
        with switched(switches):
            return block(*args)

    return checkpoint(run, *args, use_reentrant=False)


def switches_of(block: nn.Module) -> Switches:
    """The modules of a block that have switches, and how these stand."""
    found: Switches = []
    for module in block.modules():
        names = ADAPTER if hasattr(type(module), ADAPTER[0]) else ()
        if "processor" in module.__dict__ or "processor" in module._modules:  # diffusers' attention
            names = (*names, "processor")
        if names:
            found.append((module, {name: getattr(module, name) for name in names}))
    return found


@contextmanager
def switched(switches: Switches) -> Iterator[None]:
    """Inside the block the switches stand as given; afterwards as before."""
    before = [(module, {name: getattr(module, name) for name in values}) for module, values in switches]
    _turn(switches)
    try:
        yield
    finally:
        _turn(before)


def _turn(switches: Switches) -> None:
    for module, values in switches:
        for name, value in values.items():
            setattr(module, name, value)

"""One-shot pruning of a transformers model, block by block, on calibration text.

Every linear layer inside the transformer blocks is pruned; embeddings, norms, biases and heads are not. Blocks go in
order, and each is calibrated on what the blocks before it give *after* their pruning. What a block gets besides the
hidden states (masks, positions) is recorded once, in a pass that stops at the last block; so a stack costs three
passes, and never more than the hidden states of the calibration text between two blocks is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_llm.engine.blocks import Stack, block_linears, block_stacks, is_transposed, linears, matrix
from kd_llm.engine.masks import Masks, masks_of
from kd_llm.engine.rows import model_inputs
from kd_llm.engine.sparse import Hessian, Pattern, prune_by_magnitude, prune_by_sparsegpt
from kdcore.errors import InputError

Batch = Mapping[str, Tensor]


@dataclass
class Call:
    """A block's call in the recording pass, without its hidden states, which are `hidden`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: tuple[Tensor, ...]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def prune_model(
    model: nn.Module,
    batches: Sequence[Batch],
    pattern: Pattern,
    *,
    method: Literal["sparsegpt", "magnitude"] = "sparsegpt",
    one_by_one: bool = False,
    block: int = 128,
    damping: float = 0.01,
    say: Callable[[str], None] = lambda text: None,
) -> Masks:
    """Prunes `model` in place and returns its masks, (W != 0) at this moment, by parameter name, on the CPU.

    batches: calibration text as the model takes it (`input_ids`, `attention_mask`, ...); padding does not count.
        Not read by method="magnitude", which ranks each matrix by itself.
    one_by_one: inside a block too, calibrate each layer on the outputs of the pruned ones before it (as many passes
        through a block as it has layers); by default the layers of one block share a pass.
    block, damping: see `prune_by_sparsegpt`.
    Raises InputError: no blocks, a pattern that does not fit a layer, calibration without a token.
    """
    names = block_linears(model)
    for name, layer in names.items():
        pattern.check(matrix(layer).shape[1], name)
    if method == "magnitude":
        for name, layer in names.items():
            _assign(layer, prune_by_magnitude(matrix(layer).detach(), pattern, name=name))
    elif method == "sparsegpt":
        with _evaluating(model):
            for stack in block_stacks(model):
                _prune_stack(model, stack, batches, _Solver(pattern, block, damping), one_by_one, say)
    else:
        raise InputError(f"method = {method!r}: allowed: 'sparsegpt', 'magnitude'")
    return masks_of(model, [f"{name}.weight" for name in names])


@dataclass(frozen=True)
class _Solver:
    pattern: Pattern
    block: int
    damping: float

    def __call__(self, layer: nn.Module, hessian: Hessian, name: str) -> None:
        if hessian.count == 0:
            raise InputError(f"calibration: no token reaches {name}; give more calibration text")
        weight = matrix(layer).detach()
        pruned = prune_by_sparsegpt(
            weight, hessian.value, self.pattern, block=self.block, damping=self.damping, name=name
        )
        _assign(layer, pruned)


@torch.no_grad()
def _assign(layer: nn.Module, pruned: Tensor) -> None:
    layer.weight.copy_(pruned.t() if is_transposed(layer) else pruned)


@torch.no_grad()
def _prune_stack(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    solve: _Solver,
    one_by_one: bool,
    say: Callable[[str], None],
) -> None:
    hidden, calls = _record(model, stack, batches)
    for index, block in enumerate(stack.blocks):
        say(f"pruning {stack.prefix}{index} to {solve.pattern}")
        layers = linears(block)
        for group in [[name] for name in layers] if one_by_one else [list(layers)]:
            chosen = {name: layers[name] for name in group}
            hessians = _hessians(block, chosen, hidden, calls[index])
            for name, layer in chosen.items():
                solve(layer, hessians[name], f"{stack.prefix}{index}.{name}")
        hidden = [call.run(block, states) for call, states in zip(calls[index], hidden, strict=True)]


def _hessians(
    block: nn.Module, layers: Mapping[str, nn.Module], hidden: Sequence[Tensor], calls: Sequence[Call]
) -> dict[str, Hessian]:
    """One pass through the block; the Hessian of each layer's inputs."""
    found = {}
    for name, layer in layers.items():
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        found[name] = Hessian(matrix(layer).shape[1], layer.weight.device, dtype)
    for call, states in zip(calls, hidden, strict=True):
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(
                    lambda module, args, hessian=found[name], rows=call.rows: hessian.add(_real_rows(args[0], rows))
                )
                hooks.callback(hook.remove)
            call.run(block, states)
    return found


def _real_rows(inputs: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Inputs (B, S, in) -> (n, in) without padding; inputs of another layout are kept whole."""
    for mask in masks:
        if inputs.shape[:-1] == mask.shape:
            return inputs[mask]
    return inputs.reshape(-1, inputs.shape[-1])


# ---------------------------------------------------------------- the recording pass


class _Reached(Exception):
    """The last block of the stack was reached; what comes after it does not matter."""


def _record(model: nn.Module, stack: Stack, batches: Sequence[Batch]) -> tuple[list[Tensor], list[list[Call]]]:
    """Hidden states that enter the stack, one tensor a batch, and each block's calls, one a batch."""
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in stack.blocks]
    device = next(model.parameters()).device
    rows: tuple[Tensor, ...] = ()

    def keep(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states, args, kwargs = _without_states(args, kwargs)
        calls[index].append(Call(args, kwargs, rows))
        if index == 0:
            hidden.append(states)
        if index == len(stack.blocks) - 1:
            raise _Reached

    with ExitStack() as hooks:
        for index, block in enumerate(stack.blocks):
            hook = block.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: keep(index, args, kwargs), with_kwargs=True
            )
            hooks.callback(hook.remove)
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            rows = _row_masks(batch, stack)
            with suppress(_Reached):
                model(**model_inputs(model, batch))
    if not hidden or any(len(found) != len(hidden) for found in calls):
        raise InputError(
            f"{stack.name}: each block must run once a forward pass; calls per block: "
            f"{[len(found) for found in calls]} for {len(batches)} calibration batches"
        )
    return hidden, calls


def _without_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _row_masks(batch: Batch, stack: Stack) -> tuple[Tensor, ...]:
    """Masks (B, S) of the real positions, the stack's own first."""
    masks = [batch["attention_mask"].bool()] if "attention_mask" in batch else []
    if stack.decoder:
        if "decoder_attention_mask" in batch:
            masks.insert(0, batch["decoder_attention_mask"].bool())
        elif "labels" in batch:
            masks.insert(0, batch["labels"] != -100)
    return tuple(masks)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, undone afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

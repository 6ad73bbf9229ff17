"""The transformer blocks of a transformers model and the linear layers inside them.

A stack is an outermost `ModuleList` whose entries hold linear layers: `transformer.h` of GPT-2, `model.layers` of
Llama, `bert.encoder.layer` of BERT, `encoder.block` and `decoder.block` of T5. Embeddings, final norms and heads lie
outside of every stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_llm.engine.rows import IGNORE, predicted, segments
from kdcore.errors import InputError


@dataclass(frozen=True)
class Stack:
    """One stack: `name` and `blocks` of its list, `owner` the module that runs the list (the final norm included).

    decoder: it is the decoder of an encoder-decoder, whose positions are those of the labels.
    """

    name: str
    blocks: nn.ModuleList
    owner: nn.Module
    decoder: bool = False

    @property
    def prefix(self) -> str:
        return f"{self.name}." if self.name else ""


def is_linear(module: nn.Module) -> bool:
    """A plain linear layer: `nn.Linear`, or transformers' `Conv1D` (GPT-2), whose weight is (in, out)."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is `Conv1D` of transformers; told by its shape attributes so that nothing is imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as a view (out, in)."""
    weight = module.weight
    return weight.t() if is_transposed(module) else weight


def block_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of `model`, in the order of its modules. Raises InputError when there is none."""
    stacks: list[Stack] = []
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    for name, module in model.named_modules():
        if any(name.startswith(stack.prefix) for stack in stacks) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) and all(not is_linear(block) and linears(block) for block in module):
            owner = model.get_submodule(name.rpartition(".")[0])
            stacks.append(Stack(name, module, owner, pair and "decoder" in name.split(".")))
    if not stacks:
        raise InputError(f"model: {type(model).__name__} has no list of transformer blocks with linear layers in it")
    return stacks


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer of every linear layer inside `module`, in the order of its modules."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> linear layer of every linear layer inside the blocks of `model`."""
    return {
        stack.prefix + name: child for stack in block_stacks(model) for name, child in linears(stack.blocks).items()
    }


# ---------------------------------------------------------------- hidden states


@dataclass(frozen=True)
class Layer:
    """Where entry l = 1..L of a model's `hidden_states` comes out: the name of a module; `decoder` as in `Stack`."""

    name: str
    decoder: bool = False


def hidden_layers(model: nn.Module) -> list[Layer]:
    """The layers of every stack, in order. The last of a stack is its owner's output, after the final norm."""
    found = []
    names = {id(module): name for name, module in model.named_modules()}
    for stack in block_stacks(model):
        found += [Layer(f"{stack.prefix}{index}", stack.decoder) for index in range(len(stack.blocks) - 1)]
        found.append(Layer(names[id(stack.owner)], stack.decoder))
    return found


def hidden_of(output: Any) -> Tensor:
    """The hidden states (B, S, d) in what a block or a stack's owner returns."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "last_hidden_state", None)
    return output[0] if found is None else found


def real_positions(batch: Mapping[str, Any], layer: Layer) -> Tensor:
    """The positions of a layer's hidden states that are no padding, each once: a mask (B, S).

    By the attention mask; in packed batches, which have none, the documents that predict anything (their padding is
    one that does not); in an encoder-decoder's decoder, the positions with a label.
    """
    if layer.decoder:
        mask = batch.get("decoder_attention_mask")
        return batch["labels"] != IGNORE if mask is None else mask.bool()
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    if "position_ids" not in batch:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    numbers = segments(batch)
    return torch.isin(numbers, numbers[predicted(batch, shift=True)])

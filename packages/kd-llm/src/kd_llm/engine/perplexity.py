"""Perplexity of a language model on a fixed text, by domain: exp of the mean over all predicted tokens.

    CE_i = sum over the tokens of V_i of -ln q(y) / number of tokens,   perplexity_i = exp(CE_i)

Tokens weigh alike, whatever batches and processes they fall into, and padding does not count. The head multiplies the
predicting rows alone, in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_llm.engine.objective import run_body
from kd_llm.engine.rows import predicted, shifts_labels
from kd_llm.engine.token_loss import Divergence, token_terms
from kdcore.errors import InputError

Batch = Mapping[str, Any]


@torch.no_grad()
def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Sum over the batch's predicted tokens of -ln q(y), in nats (scalar), and their number."""
    shift = shifts_labels(model)
    index = predicted(batch, shift).nonzero()
    rows = run_body(model, batch, index, shift)
    ones = torch.ones(len(index), device=index.device)
    return token_terms(rows, None, ones, Divergence(), 0.0, 1.0)["hard"][1], len(index)


def perplexities(
    model: nn.Module,
    batches: Mapping[str, Sequence[Batch]],
    *,
    rank: int = 0,
    processes: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Domain -> perplexity. Each process takes every `processes`-th batch; `reduce` sums a tensor over all of them.

    The model is in eval mode meanwhile, and in its own mode again afterwards. Every process makes the same number of
    forward passes, as a sharded model needs. Raises InputError for a domain without a predicted token.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(batches), 2, dtype=torch.float64)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        for domain, found in enumerate(batches.values()):
            for turn in range(math.ceil(len(found) / processes)):
                place = turn * processes + rank
                batch = found[min(place, len(found) - 1)]
                moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                loss, tokens = token_losses(model, moved)
                if place < len(found):
                    sums[domain] += torch.tensor([float(loss), tokens], dtype=torch.float64)
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    sums = reduce(sums.to(device) if device.type != "mps" else sums).cpu()
    for name, (_, tokens) in zip(batches, sums.tolist(), strict=True):
        if tokens == 0:
            raise InputError(f"validation text of domain '{name}': has no token to predict")
    return {name: math.exp(loss / tokens) for name, (loss, tokens) in zip(batches, sums.tolist(), strict=True)}

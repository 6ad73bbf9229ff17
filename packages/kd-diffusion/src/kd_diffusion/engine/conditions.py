"""What a network is conditioned on: a dict of tensors with the batch first; {} for nothing.

class_labels (B,) int64 | prompt_embeds (B, L, D), prompt_mask (B, L), pooled_embeds (B, P), time_ids (B, 6),
resolution (B, 2), aspect_ratio (B, 1)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd_diffusion.engine.process import expand

Condition = dict[str, Tensor]


def take(condition: Condition, index: Tensor | slice) -> Condition:
    """The samples at `index`."""
    return {name: value[index] for name, value in condition.items()}


def concat(first: Condition, second: Condition) -> Condition:
    """Both, one after the other along the batch. Raises ValueError when they hold different things."""
    return _paired(first, second, lambda a, b: torch.cat((a, b)))


def where(mask: Tensor, first: Condition, second: Condition) -> Condition:
    """Per sample `first` where the mask (B,) is true, else `second`."""
    return _paired(first, second, lambda a, b: torch.where(expand(mask, a), a, b))


def _paired(first: Condition, second: Condition, function: Callable[[Tensor, Tensor], Tensor]) -> Condition:
    if first.keys() != second.keys():
        raise ValueError(f"conditions hold {sorted(first)} and {sorted(second)}; they must hold the same")
    return {name: function(value, second[name]) for name, value in first.items()}

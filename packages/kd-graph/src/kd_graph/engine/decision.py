"""Where a classifier draws the line between classes, moved without labels.

A network that was trained on something else than it is used on (distilled graphs of a few roots, whole graphs) may rank
graphs rightly and yet call nearly all of them one class. Predicting the classes as often as they are known to occur
puts that right; the ranking within a class's scores stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 50


def share_offsets(logits: Tensor, shares: Tensor) -> Tensor:
    """Offsets b (K,) with argmax(logits + b) of class k on a share shares[k] of the graphs, as near as can be.

    logits (N, K), shares (K,) that sum to 1. Class by class b_k goes to the middle of the gap between the graphs that
    are to be k and the rest; for two classes that is exact at once. Mean of b is 0.

    >>> share_offsets(torch.tensor([[3.0, 0], [2, 0], [1, 0], [9, 0]]), torch.tensor([0.5, 0.5])).tolist()
    [-1.25, 1.25]
    """
    scores, counts = logits.double(), (shares.double() * len(logits)).round().long()
    offsets = torch.zeros(logits.shape[1], dtype=torch.float64)
    best, least = offsets.clone(), _misses(scores, counts)
    for _ in range(SWEEPS):
        if not least:
            break
        for k in range(len(offsets)):
            others = (scores + offsets).index_fill(1, torch.tensor([k]), -torch.inf).amax(1)
            offsets[k] = _between((others - scores[:, k]).sort().values, int(counts[k]))
        misses = _misses(scores + offsets, counts)
        if misses < least:
            best, least = offsets.clone(), misses
    return (best - best.mean()).to(logits.dtype)


def _between(needed: Tensor, count: int) -> Tensor:
    """An offset above the first `count` of the sorted offsets that a class needs (N,), below the rest."""
    if count <= 0:
        return needed[0] - 1
    return needed[-1] + 1 if count >= len(needed) else (needed[count - 1] + needed[count]) / 2


def _misses(scores: Tensor, counts: Tensor) -> int:
    found = torch.bincount(scores.argmax(1), minlength=len(counts))
    return int((found - counts).abs().sum())

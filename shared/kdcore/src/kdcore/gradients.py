"""Per-term gradients for methods that combine them otherwise than by their sum.

`rule_backward` is the loop's backward pass for a Distiller with a `gradient_rule`: the gradient of each weighted term
is accumulated over the micro-batches, averaged over the processes, and only then combined, so that a projection sees
what the optimiser would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore.distiller import GradientRule, LossTerms
from kdcore.errors import InputError

if TYPE_CHECKING:
    from kdcore.training import Loop, Turn


def per_term_gradients(terms: LossTerms, parameters: Sequence[nn.Parameter]) -> dict[str, list[Tensor]]:
    """Term name -> gradients of weight * term, one tensor per parameter; zeros where it does not depend on it.

    A term of weight 0, or without a graph, has zero gradients. Frees the graph.
    """
    active = [name for name, (weight, term) in terms.items() if weight != 0 and term.requires_grad]
    gradients: dict[str, list[Tensor]] = {}
    for name, (weight, term) in terms.items():
        if name not in active:
            gradients[name] = [torch.zeros_like(parameter) for parameter in parameters]
            continue
        found = torch.autograd.grad(weight * term, parameters, retain_graph=name != active[-1], allow_unused=True)
        gradients[name] = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
    return gradients


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product of two lists of tensors taken as one flat vector."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def project_conflict(reference: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor]:
    """`gradient` without its component against `reference`; unchanged where the two do not oppose each other.

    v2 - min(0, <v1, v2>) / ||v1||^2 * v1 over the flattened lists. Only `gradient` is projected (PCGrad,
    arXiv 2001.06782, projects both).
    """
    overlap = dot(reference, gradient)
    norm = dot(reference, reference)
    scale = torch.where(norm > 0, overlap.clamp(max=0) / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0 * norm)
    return [g - scale * r for g, r in zip(gradient, reference, strict=True)]


def rule_backward(loop: Loop, turn: Turn, window: list[Any], rule: GradientRule) -> None:
    """Fills `.grad` of the turn's parameters with what the rule makes of the terms' gradients."""
    if loop.accelerator.scaler is not None:
        raise InputError("train.precision = 'fp16': a gradient rule needs unscaled gradients; use bf16 or fp32")
    sums: dict[str, list[Tensor]] = {}
    for batch in window:
        with loop.accelerator.no_sync(loop.model):
            found = per_term_gradients(loop.terms(batch, turn.player.name), turn.parameters)
        for name, gradients in found.items():
            scaled = [gradient / len(window) for gradient in gradients] if len(window) > 1 else gradients
            sums[name] = [a + b for a, b in zip(sums[name], scaled, strict=True)] if name in sums else list(scaled)
    if loop.accelerator.num_processes > 1:
        mean: Any = partial(loop.accelerator.reduce, reduction="mean")
        sums = {name: [mean(gradient) for gradient in gradients] for name, gradients in sums.items()}
    for parameter, gradient in zip(turn.parameters, rule(sums), strict=True):
        parameter.grad = gradient

"""Sharpness-aware minimisation (arXiv 2010.01412) as a loss: no second optimiser step, nothing to restore.

    eps = rho g / ||g||_2,  g = grad L(w);   the gradient that is applied at w is grad L(w + eps)

The second pass runs a network whose weights are w + eps with eps constant, so that its gradient in w is the one at
w + eps; the weights themselves never move. Batch-norm statistics are those of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


def perturbation(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """eps, one tensor a gradient, rho long over all of them together; 0 where the gradient is 0.

    >>> perturbation([torch.tensor([3.0, 4.0])], 0.05)
    [tensor([0.0300, 0.0400])]
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    scale = torch.where(norm > 0, rho / torch.where(norm > 0, norm, 1.0), 0.0)
    return [g * scale for g in gradients]


def sam_loss(model: nn.Module, images: Tensor, criterion: Callable[[Tensor], Tensor], rho: float) -> Tensor:
    """criterion(outputs) at w + eps, a scalar whose gradient in the model's parameters is SAM's.

    `criterion` takes the model's outputs for `images` to a scalar. With rho = 0 it is the ordinary loss, in one pass.
    """
    if rho == 0:
        return criterion(model(images))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(criterion(model(images)), list(parameters.values()), allow_unused=True)
    known = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)]
    with torch.no_grad():
        eps = perturbation(known, rho)
    moved = {name: p + e for (name, p), e in zip(parameters.items(), eps, strict=True)}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return criterion(functional_call(model, {**moved, **buffers}, (images,)))

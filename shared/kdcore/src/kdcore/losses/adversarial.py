"""Losses of the two players of a GAN, on the discriminator's raw outputs (logits, any shape; larger = more real).

    hinge           L_D = E max(0, 1 - D(x)) + E max(0, 1 + D(g))      L_G = -E D(g)            arXiv 1705.02894
    non-saturating  L_D = E softplus(-D(x)) + E softplus(D(g))         L_G = E softplus(-D(g))  arXiv 1406.2661
    R1              (gamma / 2) E ||grad_x D(x)||^2 on real x                                   arXiv 1801.04406

E is the mean over batch and positions (patch discriminators). Half precision is computed in float32. Nothing is
detached: give the discriminator's step a detached generator sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.losses._checks import check_float, check_rank, check_reduction
from kdcore.losses._numerics import Reduction, at_least_float32, per_example, reduce_rows


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean max(0, 1 - D(x)) + mean max(0, 1 + D(g)) (arXiv 1705.02894); any shapes -> scalar.

    Raises ValueError for an empty or integer tensor.

    >>> import torch
    >>> hinge_discriminator(torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 0.0])).item()
    0.75
    """
    real, fake = _logits("real_logits", real_logits), _logits("fake_logits", fake_logits)
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake_logits: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """-mean D(g) (arXiv 1705.02894); (B, ...) -> scalar, or (B,) with reduction="none".

    Raises ValueError for an empty or integer tensor.

    >>> import torch
    >>> hinge_generator(torch.tensor([0.5, -1.0])).item()
    0.25
    """
    check_reduction(reduction)
    return reduce_rows(per_example(-_logits("fake_logits", fake_logits)), reduction)


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(x)) + mean softplus(D(g)), binary cross-entropy on logits (arXiv 1406.2661); -> scalar.

    Raises ValueError for an empty or integer tensor.

    >>> import torch
    >>> round(non_saturating_discriminator(torch.zeros(2), torch.zeros(3)).item(), 5)   # 2 ln 2
    1.38629
    """
    real, fake = _logits("real_logits", real_logits), _logits("fake_logits", fake_logits)
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake_logits: Tensor, *, reduction: Reduction = "batchmean") -> Tensor:
    """mean softplus(-D(g)) = -E ln sigmoid(D(g)) (arXiv 1406.2661); (B, ...) -> scalar, or (B,) with reduction="none".

    Raises ValueError for an empty or integer tensor.

    >>> import torch
    >>> round(non_saturating_generator(torch.zeros(2)).item(), 5)
    0.69315
    """
    check_reduction(reduction)
    return reduce_rows(per_example(F.softplus(-_logits("fake_logits", fake_logits))), reduction)


def r1_penalty(real_logits: Tensor, real_inputs: Tensor, *, gamma: float) -> Tensor:
    """(gamma / 2) mean_i ||d D(x_i) / d x_i||^2 (arXiv 1801.04406, which uses gamma = 10 and up).

    `real_logits` must have been computed from `real_inputs`, which must require gradients; D(x_i) is the sum of an
    example's logits when it has several (patches). The result carries a graph for a second backward, so D must be
    twice differentiable. Logits of one example must not depend on another example (no batch norm).

    Shapes (B, ...), (B, ...) -> scalar. Raises ValueError when real_inputs takes no gradient or real_logits does not
    depend on it, or batch sizes differ.

    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> r1_penalty((x**2).sum(dim=1), x, gamma=1.0).item()      # half of ||(2, 4)||^2
    10.0
    """
    logits = _logits("real_logits", real_logits)
    check_float("real_inputs", real_inputs)
    check_rank("real_inputs", real_inputs, 1, "(B, ...)")
    if not real_inputs.requires_grad:
        raise ValueError("real_inputs takes no gradient; call requires_grad_() on it before running the discriminator")
    if logits.ndim == 0 or logits.shape[0] != real_inputs.shape[0]:
        raise ValueError(
            f"real_logits has shape {tuple(real_logits.shape)} but real_inputs has {tuple(real_inputs.shape)}; "
            "the batch sizes must be equal"
        )
    gradient = None
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits.sum(), real_inputs, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("real_logits does not depend on real_inputs; compute it from that very tensor")
    return 0.5 * gamma * at_least_float32(gradient).square().sum() / real_inputs.shape[0]


def _logits(name: str, x: Tensor) -> Tensor:
    check_float(name, x)
    check_rank(name, x, 0, "(B, ...)")
    return at_least_float32(x)

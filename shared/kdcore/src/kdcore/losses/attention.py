"""Attention transfer: match where two networks are active, whatever their channel counts (arXiv 1612.03928)."""

from __future__ import annotations

from torch import Tensor

from kdcore.losses._checks import check_float, check_reduction
from kdcore.losses._numerics import Reduction, at_least_float32, reduce_rows, unit


def attention_map(features: Tensor, *, p: float = 2.0) -> Tensor:
    """Q = vec(F) / ||vec(F)||_2 with F = mean_c abs(A_c)^p, the activation-based attention map (arXiv 1612.03928).

    Mean or sum over channels is the same after normalisation. Shape (B, C, H, W) -> (B, H * W) of unit rows, at least
    float32; a map without activation is 0. Any number of spatial dimensions works: (B, C, ...).
    Raises ValueError for fewer than 3 dimensions or p < 1.

    >>> import torch
    >>> a = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])        # (1, 2, 1, 2)
    >>> attention_map(a, p=1)
    tensor([[0.8944, 0.4472]])
    """
    check_float("features", features)
    _check_map("features", features)
    if not p >= 1:
        raise ValueError(f"p is {p}; it must be at least 1 (the gradient is unbounded below)")
    activation = at_least_float32(features).abs()
    # a common factor cancels below, and abs()^p of large activations would overflow
    scale = activation.detach().flatten(1).amax(dim=1).clamp_min(1e-30)
    activation = activation / scale.view(-1, *[1] * (features.ndim - 1))
    return unit(activation.pow(p).mean(dim=1).flatten(1), dim=1, eps=0.0)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, p: float = 2.0, reduction: Reduction = "batchmean"
) -> Tensor:
    """Mean over the H * W positions of (Q_s - Q_t)^2, Q = attention_map (arXiv 1612.03928).

    The paper sums norms and halves them; its published weights (beta = 1e3) go with the authors' code, which takes
    this mean of squares. Channels may differ, positions must agree.

    Shapes (B, C_s, H, W), (B, C_t, H, W) -> scalar, or (B,) with reduction="none".
    Raises ValueError when batch or spatial sizes differ.

    >>> import torch
    >>> a = torch.rand(2, 3, 4, 4)
    >>> round(attention_transfer(a, 5 * a.repeat(1, 2, 1, 1)).item(), 6)
    0.0
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check_float(name, x)
        _check_map(name, x)
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)} but student has {tuple(student.shape)}; batch and spatial sizes "
            "must be equal (channels may differ): interpolate one of them first"
        )
    check_reduction(reduction)
    difference = attention_map(student, p=p) - attention_map(teacher, p=p)
    return reduce_rows(difference.square().mean(dim=1), reduction)


def _check_map(name: str, x: Tensor) -> None:
    if x.ndim < 3 or x.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be a non-empty (B, C, H, W)")

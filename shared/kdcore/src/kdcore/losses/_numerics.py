"""Arithmetic that every loss shares: precision, reduction, unit vectors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["batchmean", "none"]

UNIT_EPS = 1e-8


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay (softmax tails vanish in half precision)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b outside autocast, which would round Gram matrices to half precision."""
    with torch.autocast(device_type=a.device.type, enabled=False):
        return a @ b


def unit(x: Tensor, dim: int | tuple[int, ...], eps: float | Tensor = UNIT_EPS) -> Tensor:
    """x / ||x||_2 along `dim`. A vector no longer than `eps` becomes 0 and gets no gradient: a dead feature has no
    direction, and dividing by a floor instead would send back a gradient of 1 / eps."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    alive = norm > eps
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def centred_unit(x: Tensor, centre: int, dim: int | tuple[int, ...], eps: float = UNIT_EPS) -> Tensor:
    """`unit` of x minus its mean along `centre`; what is left of a constant x is rounding and counts as 0."""
    rounding = 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True)
    return unit(x - x.mean(dim=centre, keepdim=True), dim, rounding.clamp_min(eps))


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """`batchmean`: mean over every row (all leading dimensions); `none`: the rows as they are."""
    return rows.mean() if reduction == "batchmean" else rows


def per_example(x: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean of each example."""
    return x.flatten(1).mean(dim=1) if x.ndim > 1 else x

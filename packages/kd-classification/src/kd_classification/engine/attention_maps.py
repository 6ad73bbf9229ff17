"""How a vision transformer's heads attend: how far, how differently from one another, and how much by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kd_classification.data import Images
from kd_classification.engine.masked_vit import encode, inner_vit, own_images
from kdcore.errors import InputError


def attention_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean distance between a query and what it attends to, in patches: sum_k A_qk |q - k|, averaged over q.

    attention (..., H, L, L) with rows that sum to 1, grid (rows, columns) of the L patches -> (..., H).
    """
    rows, columns = grid
    if attention.shape[-2:] != (rows * columns, rows * columns):
        raise InputError(f"attention: shape {tuple(attention.shape)}, expected two sides of {rows * columns} patches")
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(attention)
    return (attention * torch.cdist(places, places)).sum(-1).mean(-1)


def position_information(attention: Tensor) -> Tensor:
    """Normalised mutual information of query and key position, I / sqrt(H(q) H(k)), with p(q, k) = A_qk / L.

    attention (..., L, L) with rows that sum to 1 -> (...): 1 where each query attends to a key of its own, 0 where all
    attend alike. After "What Do Self-Supervised Vision Transformers Learn?" (arXiv 2305.00729).
    """
    length = attention.shape[-1]
    if attention.shape[-2] != length or length < 2:
        raise InputError(f"attention: shape {tuple(attention.shape)}, expected (..., L, L) with L of at least 2")
    joint = attention / length
    keys = joint.sum(-2)
    query_entropy = torch.log(torch.tensor(float(length), dtype=attention.dtype, device=attention.device))
    key_entropy = -torch.special.xlogy(keys, keys).sum(-1)
    joint_entropy = -torch.special.xlogy(joint, joint).sum((-2, -1))
    information = (query_entropy + key_entropy - joint_entropy).clamp(min=0)
    scale = (query_entropy * key_entropy).clamp(min=0).sqrt()
    return torch.where(scale > 0, information / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)


@torch.no_grad()
def attention_metrics(network: nn.Module, images: Images, blocks: Sequence[int]) -> dict[str, float]:
    """Means over images and `blocks`: nmi, attention_distance, and distance_spread, its deviation over the heads.

    Attention between patches alone, each row normalised again: prefix tokens have no position.
    """
    network.eval()
    vit, totals, count = cast(Any, inner_vit(network)), torch.zeros(3, dtype=torch.float64), 0
    device = next(network.parameters()).device
    for batch in images.loader(128):
        seen = encode(vit, own_images(network, batch.images.to(device)), queries_keys=blocks, blocks=max(blocks))
        for q, k in seen.queries_keys.values():
            q, k = q[:, :, vit.num_prefix_tokens :].float(), k[:, :, vit.num_prefix_tokens :].float()
            attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            distance = attention_distance(attention, vit.patch_embed.grid_size)
            parts = (position_information(attention).mean(1), distance.mean(1), distance.std(1, correction=0))
            totals += torch.stack([part.double().sum().cpu() for part in parts]) / len(seen.queries_keys)
        count += len(batch.images)
    names = ("nmi", "attention_distance", "distance_spread")
    return dict(zip(names, (totals / count).tolist(), strict=True))
